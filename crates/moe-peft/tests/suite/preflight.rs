//! What config, files and options show to be wrong is said before the first token is read.

use crate::common;
use crate::tuning;

use std::{collections::BTreeMap, path::Path};

use moe_checkpoint::Existing;
use moe_core::{
    Model,
    data::{Sequence, Wave},
};
use moe_peft::{Recipe, TrainingRun, fold::FoldPrecision};
use serde_json::{Value, json};
use tuning::model;

/// Methods that run the model to find out what they train, and what their training may name.
fn methods() -> Vec<(&'static str, Value, &'static str)> {
    let outliers = json!({"layers": 1, "every": 1, "weights": {"outliers": {"times_mean": 3}}});
    let blocks = json!({"blocks": 3});
    vec![
        ("esft", json!({"type": "esft"}), "layers.0.experts.3.down"),
        ("esft with the rest", json!({"type": "esft", "non_expert_modules": true}), "layers.1.query"),
        (
            "corda",
            json!({"type": "lora", "r": 2, "init_lora_weights": "corda_ipm", "target_modules": ["q_proj"]}),
            "model.layers.1.self_attn.q_proj.lora_B",
        ),
        ("owlore", json!({"type": "layers", "sampling": outliers, "projection": {"rank": 2}}), "layers.1.router"),
        ("smt", json!({"type": "smt", "block": 8, "attention": blocks, "warmup_steps": 2}), "layers.1.query.blocks"),
    ]
}

fn recipe(method: &Value, train: Value) -> Recipe {
    serde_json::from_value(json!({"method": method, "train": train})).unwrap()
}

/// Rows with a token that the model does not have: whoever runs it on them says so.
fn unreadable(model: &Model) -> Vec<Wave> {
    let beyond = model.config().vocab_size as u32;
    vec![Wave { id: 0, sequences: vec![Sequence::new(vec![3, beyond, 5, 7])] }]
}

fn refused(model: &Model, recipe: &Recipe, directory: &Path, resume: bool) -> String {
    let (waves, labels) = (unreadable(model), BTreeMap::new());
    let run = TrainingRun {
        model,
        waves: &waves,
        labels: &labels,
        directory,
        save_every: 1,
        resume,
        fold: FoldPrecision::Bf16,
    };
    run.train(recipe, &mut |_| Ok(())).err().unwrap().to_string()
}

#[test]
fn a_group_that_names_nothing_is_refused_before_the_model_is_run() {
    let model = model("qwen2_moe");
    let dir = tempfile::tempdir().unwrap();
    for (name, method, known) in methods() {
        let out = dir.path().join(name);
        let groups = |pattern: &str| json!({"max_steps": 2, "groups": [{"pattern": pattern, "learning_rate": 0.5}]});
        let error = refused(&model, &recipe(&method, groups("layers.*.nothing")), &out, false);
        assert!(error.contains("pattern of a parameter group: found layers.*.nothing"), "{name}: {error}");
        assert!(!out.exists(), "{name}: something was written before it was refused");
        // without the mistake the rows are what stops it
        let error = refused(&model, &recipe(&method, groups(known)), &out, false);
        assert!(error.contains(&model.config().vocab_size.to_string()) && !error.contains("group"), "{name}: {error}");
    }
}

#[test]
fn the_state_of_an_earlier_run_is_refused_before_the_model_is_run() {
    let model = model("qwen2_moe");
    let dir = tempfile::tempdir().unwrap();
    for (name, method, _) in methods() {
        let out = dir.path().join(name);
        let phase = if name == "smt" { "blocks" } else { "training" };
        std::fs::create_dir_all(out.join(phase)).unwrap();
        std::fs::write(out.join(phase).join("step-000007.json"), "{}").unwrap();
        let error = refused(&model, &recipe(&method, json!({"max_steps": 2})), &out, false);
        assert!(error.contains("the state of step 7"), "{name}: {error}");
        let error = refused(&model, &recipe(&method, json!({"max_steps": 2})), &out, true);
        assert!(!error.contains("the state of step 7"), "{name}: {error}");
    }
}

#[test]
fn what_a_method_says_of_itself_is_refused_before_the_model_is_run() {
    let model = model("qwen2_moe");
    let dir = tempfile::tempdir().unwrap();
    let wrong = [
        (json!({"type": "esft", "threshold": 0}), "threshold: found 0"),
        (
            json!({"type": "lora", "r": 64, "init_lora_weights": "corda_ipm", "target_modules": ["q_proj"]}),
            "the smaller side of its",
        ),
        (
            json!({"type": "lora", "r": 64, "init_lora_weights": "pissa", "target_modules": ["q_proj"]}),
            "the smaller side of its",
        ),
        (json!({"type": "layers", "sampling": {"layers": 1, "weights": {"given": [1, -1, 1]}}}), "weights of layers"),
        (
            json!({"type": "layers", "sampling": {"layers": 1, "weights": {"linear": {"first": 0, "last": 0}}}}),
            "weights of layers",
        ),
        (json!({"type": "smt", "attention": {"share": 1e-9}}), r#"attention: found {"share":1e-9}"#),
    ];
    for (method, expected) in wrong {
        let out = dir.path().join("out");
        let error = refused(&model, &recipe(&method, json!({"max_steps": 2})), &out, false);
        assert!(error.contains(expected) && !out.exists(), "{method}: {error}");
    }
    let (waves, labels) = (Vec::new(), BTreeMap::new());
    let directory = &dir.path().join("none");
    let run = TrainingRun {
        model: &model,
        waves: &waves,
        labels: &labels,
        directory,
        save_every: 1,
        resume: false,
        fold: FoldPrecision::Bf16,
    };
    let error = run.train(&recipe(&json!({"type": "esft"}), json!({})), &mut |_| Ok(())).err().unwrap().to_string();
    assert!(error.contains("training waves: found 0") && !directory.exists(), "{error}");
}

#[test]
fn an_output_inside_the_model_is_refused_before_the_model_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    std::fs::create_dir(&base).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(tuning::fixture("qwen2_moe").join(name), base.join(name)).unwrap();
    }
    let model = Model::open(&base, &common::device(), None).unwrap();
    for (name, method, _) in methods() {
        // what is trained would be written to DIR/model, which is the model
        let error = refused(&model, &recipe(&method, json!({"max_steps": 2})), dir.path(), false);
        assert!(error.contains(base.to_str().unwrap()) && !error.contains("token"), "{name}: {error}");
    }
}

#[test]
fn what_is_outlined_has_the_names_and_shapes_of_what_is_trained() {
    let model = model("qwen2_moe");
    let rows = tuning::waves(&model, 3);
    let dir = tempfile::tempdir().unwrap();
    for (name, method, _) in methods() {
        use moe_peft::{AdapterSet, Setting, TuningMethod};
        let recipe = recipe(&method, json!({}));
        let on = Setting::new(&model).with_waves(&rows);
        let (mut outlined, mut installed) = (AdapterSet::new(), AdapterSet::new());
        recipe.outline(&on, &mut outlined).unwrap();
        assert_eq!(if name == "corda" { 0 } else { outlined.bank().bytes() }, 0, "{name}");
        recipe.install(&on, &mut installed).unwrap();
        for live in installed.bank().iter() {
            let other = outlined.bank().get(live.name()).unwrap_or_else(|| panic!("{name}: {}", live.name()));
            assert!(name == "smt" || other.shape() == live.shape(), "{name}: {}", live.name());
        }
        let places = |set: &AdapterSet| set.sites().map(|(site, _)| *site).collect::<Vec<_>>();
        let all = places(&outlined);
        assert!(places(&installed).iter().all(|site| all.contains(site)), "{name}");
        let labels = BTreeMap::new();
        let directory = &dir.path().join(name);
        let run = TrainingRun {
            model: &model,
            waves: &rows,
            labels: &labels,
            directory,
            save_every: 1,
            resume: false,
            fold: FoldPrecision::Bf16,
        };
        let mut short = recipe.clone();
        short.train.max_steps = Some(2);
        run.train(&short, &mut |_| Ok(())).unwrap().save(&model, directory, Existing::Refuse).unwrap();
    }
}
