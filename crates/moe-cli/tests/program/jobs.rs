//! Jobs that take one command each, and what must be equal between them.

use std::fs;

use moe_checkpoint::Checkpoint;
use moe_cli::TINY_MOE;
use serde_json::{Value, json};

use crate::support::{find, moe, ok, refused, rows, text, words};

fn json_of(line: &[&str]) -> Value {
    serde_json::from_str(&ok(&[line, &["--json"]].concat())).unwrap()
}

/// The figure that `moe eval` gives of a model, perhaps with an adapter.
fn measured(model: &str, more: &[&str], data: &str) -> f64 {
    let line = [&["eval", "--model", model, "--data", data, "--rows", "40"][..], more].concat();
    json_of(&line)["measured"][0]["value"].as_f64().unwrap()
}

#[test]
fn a_step_that_changes_nothing_leaves_the_loss_of_a_model_with_shared_weights_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (shared, adapted, data) = (dir.path().join("shared"), dir.path().join("adapted"), rows("prose_calibration"));
    let given = ["--model", TINY_MOE, "--data", &data, "--out", text(&shared)];
    ok(&words("merge --recipe m-smoe --ratio 0.5 --form grouped --samples 32", &given));
    let lora =
        json!({"type": "lora", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]});
    let lora = lora.to_string();
    let given = ["--model", text(&shared), "--data", &data, "--method", &lora, "--out", text(&adapted)];
    ok(&words("tune --loss-over-prompts --samples 32 --learning-rate 1e-12 --steps 1", &given));
    let test = rows("prose_test");
    let before = measured(text(&shared), &[], &test);
    assert_eq!(measured(text(&adapted.join("lora/model")), &[], &test), before);
    let adapter = adapted.join("lora/adapter");
    assert_eq!(measured(text(&shared), &["--adapter", text(&adapter)], &test), before);
    assert!(measured(TINY_MOE, &[], &test) < before, "merging half of the experts costs something");
}

#[test]
fn condensers_that_were_trained_and_saved_measure_as_they_did_in_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data, test) = (dir.path().join("out"), rows("facts_calibration"), rows("prose_test"));
    let given = ["--model", TINY_MOE, "--data", &data, "--eval", &test, "--out", text(&out)];
    let report = json_of(&words("run condensers --samples 64", &given));
    let steps = report["steps"].as_array().unwrap();
    let figures: Vec<f64> = steps.iter().filter_map(|step| step["measured"][0]["value"].as_f64()).collect();
    let [before, after] = figures[..] else { panic!("{report}") };
    assert_ne!(before, after);
    let model = out.join("model");
    let line = ["eval", "--model", text(&model), "--data", &test];
    assert_eq!(json_of(&line)["measured"][0]["value"].as_f64().unwrap(), after);
}

#[test]
fn a_chain_may_stand_on_the_command_line_and_merges_before_it_prunes() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("out"), rows("arithmetic_calibration"));
    let chain = json!({"steps": [
        {"merge": {"recipe": "hc-smoe", "amount": {"ratio": 0.25}}},
        {"score": {"scorers": ["fisher"]}},
        {"prune": {"budget": {"ratio": 0.25}, "form": "uniform"}},
        {"write": {}}
    ]});
    let chain = chain.to_string();
    let given = ["run", &chain, "--model", TINY_MOE, "--data", &data, "--samples", "16", "--out", text(&out)];
    ok(&given);
    let (base, made) = (Checkpoint::open(TINY_MOE).unwrap(), Checkpoint::open(out.join("model")).unwrap());
    let (before, after) = (&base.shape().layers[0], &made.shape().layers[0]);
    assert_eq!((after.num_experts(), after.widths[0]), (before.num_experts() * 3 / 4, before.widths[0] * 3 / 4));
    let (code, error) = refused(&["run", r#"{"steps": [{"write": {}}], "sead": 1}"#, "--out", text(&out)]);
    assert!(code == 2 && error.contains("sead"), "{error}");
}

#[test]
fn a_merge_takes_the_form_that_stock_loaders_read_where_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows("arithmetic_calibration");
    let merge = |recipe: &str| {
        let out = dir.path().join(recipe);
        let given = ["--model", TINY_MOE, "--data", &data, "--recipe", recipe, "--out", text(&out)];
        ok(&words("merge --ratio 0.5 --samples 8 --length 48", &given));
        Checkpoint::open(out).unwrap()
    };
    let (stock, shared) = (merge("hc-smoe"), merge("m-smoe"));
    // What a warning says is words wherever it goes, and no codes of colors.
    let (out, recipe) = (dir.path().join("again"), "hc-smoe");
    let given = ["--model", TINY_MOE, "--data", &data, "--recipe", recipe, "--out", text(&out)];
    let said = String::from_utf8(moe(&words("merge --ratio 0.5 --samples 8 --length 48", &given)).stderr).unwrap();
    assert!(said.contains("WARN") && !said.contains('\u{1b}'), "{said}");
    assert!(!stock.grouped() && stock.shape().layers.iter().all(|layer| layer.num_experts() == 8));
    assert!(shared.grouped(), "its layers keep different numbers of experts");
    // As many experts as there is room for: one more in every layer would be too many bytes.
    let out = dir.path().join("bytes");
    let given = ["--model", TINY_MOE, "--data", &data, "--recipe", "hc-smoe", "--out", text(&out)];
    ok(&words("merge --keep-bytes 5MB --samples 8 --length 48", &given));
    let (base, kept) = (Checkpoint::open(TINY_MOE).unwrap(), Checkpoint::open(&out).unwrap());
    let experts = kept.shape().layers[0].num_experts();
    let one = base.expert_bytes_on_disk(0).unwrap() / 16 * 4;
    assert!(kept.bytes_on_disk() <= 5_000_000 && kept.bytes_on_disk() + one > 5_000_000, "{experts}");
    let given = ["--model", TINY_MOE, "--data", &data, "--recipe", "hc-smoe", "--out", text(&out)];
    let (code, error) = refused(&words("merge --keep-parameters 1000 --force", &given));
    assert!(code == 2 && error.contains("--keep-parameters"), "{error}");
}

#[test]
fn what_verbs_wrote_is_one_json_object_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (keep, out) = (path("keep.json"), path("kept"));
    let experts: Vec<Value> = (0..6).map(|expert| json!({"layer": 0, "expert": expert})).collect();
    fs::write(&keep, json!(experts).to_string()).unwrap();
    let given = ["--model", TINY_MOE, "--keep-list", text(&keep), "--form", "ragged", "--out", text(&out)];
    let report = json_of(&words("prune", &given));
    let summary = report["steps"][0]["summary"].as_str().unwrap();
    assert!(summary.starts_with("10 of 64 experts dropped"), "{summary}");

    let plan = find(&path("kept.steps"), "plan.json");
    let made = path("applied");
    let given = ["--model", TINY_MOE, "--plan", text(&plan), "--out", text(&made)];
    let applied = json_of(&words("apply --form ragged", &given));
    assert_eq!(applied["applied"].as_array().unwrap().len(), 1);
    assert!(applied["applied"][0]["prune"]["layers"].is_array(), "{applied}");
    assert_eq!(applied["bytes"].as_u64().unwrap(), Checkpoint::open(&made).unwrap().bytes_on_disk());
    let (code, error) = refused(&words("apply", &["--model", text(&made), "--plan", text(&plan), "--out", "x"]));
    assert!(code == 1 && error.contains("--rebind"), "{error}");

    let (data, trace) = (rows("facts_test"), path("trace.safetensors"));
    let traced = json_of(&["trace", "--model", TINY_MOE, "--tokens", &data, "--out", text(&trace)]);
    assert!(traced["loss"].as_f64().unwrap() > 0.0 && traced["tensors"].as_u64().unwrap() > 4);
    let delta = path("delta");
    let encoded =
        json_of(&["delta", "encode", "--base", TINY_MOE, "--tuned", TINY_MOE, "--plain", "--out", text(&delta)]);
    assert_eq!((&encoded["kept"], &encoded["tensors"]), (&json!(0), &json!(0)));
    let restored = json_of(&["delta", "apply", text(&delta), "--base", TINY_MOE, "--out", text(&path("restored"))]);
    assert_eq!(restored["out"], json!(path("restored")));
}
