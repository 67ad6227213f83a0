//! Routing, layers and decoding at run time, in verbs and recipes.

use std::fs;

use moe::recipe::Recipe;
use moe_checkpoint::Checkpoint;
use moe_cli::TINY_MOE;
use serde_json::{Value, json};

use crate::small;
use crate::support::{ok, refused, rows, text, words};

fn measured(more: &[&str]) -> Value {
    let data = rows("facts_test");
    let files = ["--model", TINY_MOE, "--data", &data, "--json"];
    let line = words("eval --rows 12 --max-new-tokens 10", &[&files[..], more].concat());
    let report: Value = serde_json::from_str(&ok(&line)).unwrap();
    report["measured"][0].clone()
}

#[test]
fn evaluation_takes_rules_paths_and_sources_and_says_the_experts_per_token() {
    let plain = measured(&[]);
    assert_eq!((&plain["experts_per_token"], &plain["layers_per_token"]), (&json!(4.0), &json!(4.0)));
    let same = measured(&["--routing", r#"{"type": "top_k", "k": 4}"#, "--layers", "0-3"]);
    assert_eq!((&same["value"], &same["experts_per_token"]), (&plain["value"], &plain["experts_per_token"]));
    let two = measured(&["--routing", r#"{"type": "top_k", "k": 2}"#]);
    assert_eq!(two["experts_per_token"], json!(2.0));
    let calibration = rows("facts_calibration");
    let rule = r#"{"type": "top_p", "experts": 2.5}"#;
    let found = measured(&["--routing", rule, "--routing-data", &calibration]);
    let experts = found["experts_per_token"].as_f64().unwrap();
    assert!((experts - 2.5).abs() < 0.5, "{experts}");
    let spoken = measured(&["--draft", TINY_MOE, "--draft-tokens", "3"]);
    assert_eq!(spoken["value"], plain["value"]);
    let (proposed, accepted) = (&spoken["decoding"]["proposed"], &spoken["decoding"]["accepted"]);
    assert!(proposed == accepted && proposed.as_u64().unwrap() > 0, "{spoken}");
    measured(&["--decoding", "contrastive", "--with", TINY_MOE]);
    let prose = rows("prose_test");
    for (more, expected) in [
        (&["--routing", "skip"][..], "--routing-data"),
        (&["--routing", "top_q"], "top_q"),
        (&["--layers", "0-9"], "below 4"),
        (&["--decoding", "contrastive"], "expected 1 beside"),
        (&["--routing", r#"{"type": "top_k", "k": 2}"#, "--routing-data", &calibration], "no threshold"),
    ] {
        let files = ["--model", TINY_MOE, "--data", &prose];
        let (_, error) = refused(&words("eval --rows 4", &[&files[..], more].concat()));
        assert!(error.contains(expected), "{more:?}: {error}");
    }
    let files = ["--model", TINY_MOE, "--data", &prose, "--draft", TINY_MOE];
    assert!(refused(&words("eval --rows 4", &files)).1.contains("no file has answers to generate"));
}

#[test]
fn generation_takes_them_too() {
    let prompt = ["--model", TINY_MOE, "--prompt", "Aruba lies in", "--json"];
    let run = |more: &[&str]| -> Value {
        let line = words("generate --max-new-tokens 6", &[&prompt[..], more].concat());
        serde_json::from_str(&ok(&line)).unwrap()
    };
    let plain = run(&[]);
    let drafted = run(&["--draft", TINY_MOE]);
    assert_eq!(drafted["completion"], plain["completion"]);
    assert!(drafted["decoding"]["steps"].as_u64() < drafted["decoding"]["tokens"].as_u64());
    assert!(plain.get("decoding").is_none());
    run(&["--decoding", "self_contrast"]);
    run(&["--layers", "0-1,1-3", "--routing", r#"{"type": "top_k", "k": 1}"#]);
    run(&["--decoding", "fusion", "--with", TINY_MOE, "--with", TINY_MOE]);
}

#[test]
fn a_step_changes_how_a_model_is_run_and_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, steps: Value| {
        let out = dir.path().join(name);
        let recipe = serde_json::from_value::<Recipe>(json!({"model": TINY_MOE, "out": out, "steps": steps})).unwrap();
        let file = dir.path().join(format!("{name}.json"));
        fs::write(&file, serde_json::to_string(&small(recipe, &out)).unwrap()).unwrap();
        (out, file)
    };
    let (out, file) = run(
        "shallow",
        json!([
            {"adapt": {"drop": {"type": "angular", "layers": 1}, "routing": {"type": "top_k", "k": 2}}},
            {"adapt": {"routing": {"type": "skip", "share": 0.25}}},
            {"evaluate": {"data": [rows("facts_test")], "options": {"rows": 4, "max_new_tokens": 4}}},
            {"write": {}}
        ]),
    );
    ok(&["run", text(&file)]);
    let written = Checkpoint::open(out.join("model")).unwrap();
    assert_eq!((written.config().layers.len(), written.config().routing.top_k), (3, 2));
    let run_time: Value = serde_json::from_str(&fs::read_to_string(out.join("model/run_time.json")).unwrap()).unwrap();
    assert_eq!(run_time["routing"]["type"], "skip");
    assert_eq!(run_time["routing"]["beta"].as_array().unwrap().len(), 3);
    let data = rows("facts_test");
    let model = out.join("model");
    let files = ["--model", text(&model), "--data", &data, "--json"];
    let report: Value = serde_json::from_str(&ok(&words("eval --rows 4 --max-new-tokens 4", &files))).unwrap();
    let experts = report["measured"][0]["experts_per_token"].as_f64().unwrap();
    assert!(experts < 2.0 && experts > 1.2, "{experts}");
    for (name, steps, expected) in [
        ("nothing", json!([{"adapt": {}}]), "none of routing, layers and drop"),
        ("both", json!([{"adapt": {"layers": "0-3", "drop": {"type": "list", "layers": [1]}}}]), "one of them"),
        ("far", json!([{"adapt": {"layers": "0-7"}}]), "below 4"),
        ("many", json!([{"adapt": {"drop": {"type": "list", "layers": [0, 1, 2, 3]}}}]), "at most 3 of 4"),
        (
            "after",
            json!([{"adapt": {"layers": "0-2"}}, {"score": {"scorers": ["reap"]}}, {"prune": {"budget": {"ratio": 0.5}}}]),
            "comes after the steps that change the model",
        ),
    ] {
        let (_, file) = run(name, steps);
        let (_, error) = refused(&["run", text(&file)]);
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn adapt_writes_what_it_found_on_rows_and_every_verb_follows_it() {
    let dir = tempfile::tempdir().unwrap();
    let facts = rows("facts_calibration");
    let generated = |model: &str, more: &[&str]| -> Value {
        let line = ["--model", model, "--prompt", "Aruba lies in", "--json"];
        serde_json::from_str(&ok(&words("generate --max-new-tokens 5", &[&line[..], more].concat()))).unwrap()
    };
    for (name, more, file) in [
        ("skipping", &["--layers", r#"{"type": "token_skip", "share": 0.2}"#][..], "run_time.json"),
        (
            "routed",
            &[
                "--layers",
                r#"{"type": "layer_routers", "search": {"simulations": 2}, "training": {"train": {"epochs": 2}}}"#,
            ],
            "layer_routers.safetensors",
        ),
        ("remixed", &["--decoding", r#"{"type": "pathways", "remix": {"neighbors": 2}}"#], "references.json"),
        ("shared out", &["--routing", r#"{"type": "top_k_search", "experts": 2.5}"#], "run_time.json"),
        ("rewired", &["--decoding", r#"{"type": "rewiring", "steps": 1, "every": 4}"#], "run_time.json"),
        ("shallow", &["--drop", r#"{"type": "attention_rank", "layers": 1}"#], "config.json"),
    ] {
        let out = dir.path().join(name);
        let mut line = vec!["--model", TINY_MOE, "--out", text(&out)];
        line.extend(more);
        if name != "rewired" {
            line.extend(["--data", &facts]);
        }
        ok(&words("adapt --samples 6 --length 48", &line));
        let model = out.join("model");
        assert!(model.join(file).exists(), "{name}");
        let found = generated(text(&model), &[]);
        assert!(found["tokens"].as_u64().unwrap() > 0, "{name}");
    }
    // a setting that changes nothing gives the model's own text
    let plain = generated(TINY_MOE, &[]);
    let idle = r#"{"type": "token_skip", "share": 0.0}"#;
    let found = generated(TINY_MOE, &["--layers", idle, "--routing-data", &facts]);
    assert_eq!(found["completion"], plain["completion"]);
    let still = generated(TINY_MOE, &["--decoding", r#"{"type": "rewiring", "learning_rate": 0.0}"#]);
    assert_eq!(still["completion"], plain["completion"]);
    let shared = generated(TINY_MOE, &["--decoding", "self_contrast"]);
    assert!(shared["decoding"]["shared_halves"].as_u64() < shared["decoding"]["weak_halves"].as_u64());
    for (more, expected) in [
        (&["--layers", "layer_routers"][..], "data.calibration names no file"),
        (&["--norms", "fold"], "RMSNorms already"),
        (&["--decoding", "speculative"], "run-time options"),
        (&["--routing", r#"{"type": "top_k", "k": 2}"#, "--data", &facts], "nothing of what is asked for"),
        (&[], "none of routing, layers and drop"),
    ] {
        let out = dir.path().join("refused");
        let line = [&["--model", TINY_MOE, "--out", text(&out)][..], more].concat();
        let (_, error) = refused(&words("adapt", &line));
        assert!(error.contains(expected), "{more:?}: {error}");
    }
}
