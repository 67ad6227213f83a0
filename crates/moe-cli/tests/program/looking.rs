//! `moe inspect`, `moe compare`, `moe eval` and `moe generate` on everything that the verbs write.

use std::fs;
use std::path::Path;

use moe::recipe::Recipe;
use moe_checkpoint::Checkpoint;
use moe_cli::TINY_MOE;
use serde_json::{Value, json};

use crate::small;
use crate::support::{find, ok, refused, rows, text, words};

fn kind(path: &Path) -> String {
    let shown: Value = serde_json::from_str(&ok(&["inspect", text(path), "--json"])).unwrap();
    let plain = ok(&["inspect", text(path)]);
    for debug in ["Some(", "{ ", "None,", "TopK", "Fused"] {
        assert!(!plain.contains(debug), "{}: {debug}: {plain}", path.display());
    }
    assert!(shown["kind"] == "tensors" || shown["operations"].is_array() || shown["steps"].is_array(), "{shown}");
    shown["kind"].as_str().unwrap().to_string()
}

/// Layers are called what they are, also where they are one half alone.
#[test]
fn layers_without_a_feed_forward_half_are_not_called_dense() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    for (name, expected) in [
        ("nemotron_h", "6 (2 MoE, 2 Mamba2 alone, 1 attention alone, 1 dense)"),
        ("nemotron_h_latent", "4 (2 MoE, 1 Mamba2 alone, 1 attention alone)"),
        ("qwen2_moe_mixed", "4 (1 MoE, 3 dense)"),
        ("qwen3_5_moe_text", "3 (3 MoE)"),
    ] {
        let shown: Value = serde_json::from_str(&ok(&["inspect", text(&fixtures.join(name)), "--json"])).unwrap();
        assert_eq!(shown["layers"], expected, "{name}");
    }
}

/// Runs a recipe of these steps and gives its directory.
fn run(dir: &Path, name: &str, steps: &Value) -> std::path::PathBuf {
    let out = dir.join(name);
    let recipe: Recipe = serde_json::from_value(json!({"model": TINY_MOE, "out": out, "steps": steps})).unwrap();
    let file = dir.join(format!("{name}.json"));
    fs::write(&file, serde_json::to_string(&small(recipe, &out)).unwrap()).unwrap();
    ok(&["run", text(&file)]);
    assert_eq!(kind(&file), "recipe");
    out
}

#[test]
fn every_artifact_is_known() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(kind(Path::new(TINY_MOE)), "checkpoint");
    let (data, scores) = (rows("arithmetic_calibration"), dir.path().join("scores"));
    let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&scores)];
    ok(&words("score --scorer reap --samples 8 --length 48 --super-experts default", &files));
    assert_eq!(kind(&scores.join("reap.safetensors")), "scores");
    assert_eq!(kind(&scores), "statistics");
    assert!(kind(&scores.join("experts.jsonl")).starts_with("experts of every layer"));
    let mask = dir.path().join("mask.json");
    fs::write(&mask, json!([{"layer": 1, "expert": 0}]).to_string()).unwrap();
    assert!(kind(&mask).contains("protection mask"));

    let pruned = run(
        dir.path(),
        "pruned",
        &json!([
            {"score": {"scorers": ["fisher"]}},
            {"prune": {"budget": {"ratio": 0.5}, "form": "ragged"}},
            {"repair": {"type": "refit"}},
            {"write": {}}
        ]),
    );
    assert!(kind(&pruned.join("model")).contains("ragged"));
    assert_eq!(kind(&pruned.join("model/moe_record.json")), "record of a model");
    assert_eq!(kind(&find(&pruned, "plan.json")), "plan of pruning");
    assert_eq!(kind(&find(&pruned, "edits.safetensors")), "edits of a pruned model");
    let merged = run(
        dir.path(),
        "merged",
        &json!([
            {"merge": {"recipe": "mc-smoe", "form": "grouped"}},
            {"write": {}}
        ]),
    );
    assert!(kind(&merged.join("model")).contains("grouped"));
    assert_eq!(kind(&find(&merged, "evidence.safetensors")), "evidence of merging");
    let plan =
        fs::read_dir(merged.join("steps")).unwrap().map(|e| e.unwrap().path()).find(|p| text(p).contains("/merge-"));
    assert_eq!(kind(&plan.unwrap().join("plan.json")), "plan of merging");
    assert!(kind(&find(&merged, "compact")).starts_with("compact experts"));
    let tuned = run(dir.path(), "tuned", &json!([{"tune": {"method": "lora", "fold": false}}, {"write": {}}]));
    assert_eq!(kind(&tuned.join("model-adapter")), "adapter: a LoRA");
    assert_eq!(kind(&find(&tuned, "recipe.json")), "recipe of fine-tuning");
    let mixture = run(dir.path(), "mixture", &json!([{"tune": {"method": "mola"}}, {"write": {}}]));
    assert_eq!(kind(&mixture.join("model-adapter")), "adapter: a mixture of LoRA experts");
    let condensers = run(dir.path(), "condensers", &json!([{"tune": {"method": "condensers"}}, {"write": {}}]));
    assert_eq!(kind(&condensers.join("model/condensers.safetensors")), "condenser experts");
    assert!(ok(&["inspect", text(&condensers.join("model"))]).contains("condenser experts"));
    let delta = dir.path().join("adapter.delta");
    ok(&["delta", "encode", "--adapter", text(&tuned.join("model-adapter")), "--out", text(&delta)]);
    assert_eq!(kind(&delta), "delta");

    // The ragged model as a plugin of vLLM reads it, and back to the same weights.
    let (flat, back) = (dir.path().join("flat"), dir.path().join("back"));
    let ragged = pruned.join("model");
    ok(&words("convert --to flat-ragged", &[text(&ragged), "--out", text(&flat)]));
    assert!(kind(&flat).contains("flat ragged"));
    ok(&words("convert --to ragged", &[text(&flat), "--out", text(&back)]));
    let (first, second) = (Checkpoint::open(&ragged).unwrap(), Checkpoint::open(&back).unwrap());
    assert_eq!(first.shape(), second.shape());
    for info in first.tensors() {
        let whole = 0..info.bytes as usize;
        assert_eq!(
            first.tensor_bytes(&info.name, whole.clone()).unwrap(),
            second.tensor_bytes(&info.name, whole).unwrap()
        );
    }
    let (_, error) = refused(&words("convert --to flat-ragged", &[TINY_MOE, "--out", text(&dir.path().join("no"))]));
    assert!(error.contains("--form ragged"), "{error}");

    // What was trained is measured as it was before it was written.
    let facts = rows("facts_test");
    let measured = |line: &str, more: &[&str]| -> Value { serde_json::from_str(&ok(&words(line, more))).unwrap() };
    let small = "--rows 8 --max-new-tokens 6 --json";
    let condensed = condensers.join("model");
    let alone = measured(&format!("eval {small}"), &["--model", text(&condensed), "--data", &facts]);
    assert!(alone["measured"][0]["value"].is_number());
    let adapter = tuned.join("model-adapter");
    for adapter in [&adapter, &mixture.join("model-adapter")] {
        let with = ["--model", TINY_MOE, "--adapter", text(adapter), "--data", &facts];
        assert!(measured(&format!("eval {small} --perplexity"), &with)["measured"][0]["value"].as_f64().unwrap() > 1.0);
        let said = ok(&words(
            "generate --max-new-tokens 4 --prompt Question:",
            &["--model", TINY_MOE, "--adapter", text(adapter)],
        ));
        assert!(said.ends_with('\n') && said.len() > 1);
    }
    let (_, error) =
        refused(&words("eval", &["--model", text(&condensed), "--adapter", text(&adapter), "--data", &facts]));
    assert!(error.contains("condenser experts beside its weights"), "{error}");

    // A plan is run without being written, and measures as what is written from it.
    let plan = find(&pruned, "plan.json");
    let written = dir.path().join("written");
    ok(&words("apply --form ragged", &["--model", TINY_MOE, "--plan", text(&plan), "--out", text(&written)]));
    let report = measured(
        &format!("compare {small} {TINY_MOE}"),
        &[text(&written), "--plan", text(&plan), "--adapter", text(&adapter), "--data", &facts],
    );
    let models = report["models"].as_array().unwrap();
    assert_eq!(models.len(), 4);
    let number = |model: usize, key: &str| models[model][key].as_f64().unwrap();
    assert_eq!(number(0, "divergence"), 0.0);
    assert!(number(1, "divergence") > 0.0, "{report}");
    assert_eq!(number(1, "divergence"), number(2, "divergence"), "{report}");
    assert_eq!(
        (number(1, "bytes"), &models[1]["measured"][0]["value"]),
        (number(2, "bytes"), &models[2]["measured"][0]["value"])
    );
    assert!(number(1, "parameters") < number(0, "parameters"));
    assert_eq!(number(0, "parameters") as u64, Checkpoint::open(TINY_MOE).unwrap().parameters());
    let table = ok(&words("compare --rows 4 --max-new-tokens 4", &[TINY_MOE, text(&written), "--data", &facts]));
    assert!(table.contains("KL, nats") && table.contains("facts_exact"), "{table}");
    let (code, error) = refused(&["compare", TINY_MOE, "--data", &facts]);
    assert!(code == 2 && error.contains("two or more"), "{error}");
    let streamed = [
        "generate",
        "--model",
        TINY_MOE,
        "--plan",
        text(&plan),
        "--prompt",
        "Question: Vic finds",
        "--max-new-tokens",
        "4",
    ];
    assert!(ok(&streamed).len() > 1);
}

#[test]
fn rows_of_data_are_shown_as_tokens_with_what_counts() {
    let data = rows("arithmetic_calibration");
    let line = ["inspect", &data, "--model", TINY_MOE, "--loss", "answers"];
    let shown = ok(&line);
    assert!(shown.contains("rows of data") && shown.matches("count in the loss").count() >= 4, "{shown}");
    assert!(shown.contains("Answer:⟦ 25 + 11 = 36"), "{shown}");
    let report: Value = serde_json::from_str(&ok(&[&line[..], &["--json", "--rows", "2"]].concat())).unwrap();
    let first = &report["first rows"];
    assert_eq!(first.as_array().unwrap().len(), 2);
    let counts: Vec<bool> = serde_json::from_value(first[0]["counts"].clone()).unwrap();
    assert!(!counts[0] && *counts.last().unwrap());
    assert!(report["count in the loss"].as_u64().unwrap() < report["tokens"].as_u64().unwrap());
    let (_, error) = refused(&["inspect", &data]);
    assert!(error.contains("tokenizer"), "{error}");
}

#[test]
fn answers_are_shown_with_the_end_that_training_gives_them() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    std::fs::write(&data, "{\"prompt\": \"12+30=\", \"completion\": \"42\"}\n").unwrap();
    let line = ["inspect", text(&data), "--model", TINY_MOE, "--loss", "answers"];
    let counted = |more: &[&str]| {
        let report: Value = serde_json::from_str(&ok(&[&line[..], &["--json"], more].concat())).unwrap();
        (report["tokens"].as_u64().unwrap(), report["count in the loss"].as_u64().unwrap())
    };
    let (tokens, in_the_loss) = counted(&["--no-eos"]);
    assert_eq!(counted(&[]), (tokens + 1, in_the_loss + 1));
    assert!(ok(&line).contains("12+30=⟦42<|endoftext|>⟧"), "{}", ok(&line));
}

#[test]
fn a_folder_of_rows_is_shown_as_its_files_and_a_folder_of_a_model_is_not() {
    let dir = tempfile::tempdir().unwrap();
    for (name, prompt) in [("b.jsonl", "1+1="), ("a.jsonl", "2+2=")] {
        let row = serde_json::json!({ "prompt": prompt, "completion": "4" });
        std::fs::write(dir.path().join(name), format!("{row}\n")).unwrap();
    }
    let shown = ok(&["inspect", text(dir.path()), "--model", TINY_MOE, "--loss", "answers"]);
    let (first, second) = (shown.find("a.jsonl:1").unwrap(), shown.find("b.jsonl:1").unwrap());
    assert!(first < second && shown.contains("rows               2"), "{shown}");
    std::fs::write(dir.path().join("config.json"), "{\"model_type\": \"qwen3_moe\"}").unwrap();
    let (_, error) = refused(&["inspect", text(dir.path())]);
    assert!(error.contains("`qwen3_moe`"), "{error}");
}

#[test]
fn a_plan_of_a_base_goes_to_its_sibling() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = run(dir.path(), "tuned", &json!([{"tune": {"method": "full"}}, {"write": {}}]));
    let pruned = run(
        dir.path(),
        "pruned",
        &json!([
            {"score": {"scorers": ["reap"]}},
            {"prune": {"budget": {"experts_per_layer": 8}}}
        ]),
    );
    let (plan, out, sibling) = (find(&pruned, "plan.json"), dir.path().join("out"), tuned.join("model"));
    let files = ["--model", text(&sibling), "--plan", text(&plan), "--out", text(&out)];
    let (_, error) = refused(&words("apply", &files));
    assert!(error.contains("model"), "{error}");
    ok(&words("apply --rebind", &files));
    assert!(Checkpoint::open(&out).unwrap().shape().layers.iter().all(|layer| layer.num_experts() == 8));
    // One of other shapes is no sibling.
    let again = dir.path().join("again");
    let (_, error) =
        refused(&words("apply --rebind", &["--model", text(&out), "--plan", text(&plan), "--out", text(&again)]));
    assert!(error.contains("experts in layer"), "{error}");
}
