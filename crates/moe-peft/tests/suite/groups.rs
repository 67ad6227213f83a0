//! Fine-tuning that the ranks of a group share: the files of one process for any number of them.

use crate::tuning;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use moe_checkpoint::Existing;
use moe_checkpoint::group::{Group, Threads};
use moe_core::{Model, data::Wave, train::Schedule};
use moe_peft::{Recipe, Result, TrainingRun, fold::FoldPrecision};
use tuning::{model, waves};

fn recipe(json: &str) -> Recipe {
    let mut recipe: Recipe = serde_json::from_str(json).unwrap();
    recipe.train.schedule = Schedule::constant(1e-2);
    (recipe.train.epochs, recipe.train.max_steps, recipe.train.waves_per_step) = (1000, Some(4), 3);
    recipe.train.evaluate_every = Some(2);
    recipe
}

/// Trains in a directory that all ranks see; the first saves.
fn train(group: &dyn Group, model: &Model, waves: &[Wave], recipe: &Recipe, directory: &Path) -> Result<()> {
    let labels = BTreeMap::new();
    let fold = FoldPrecision::Bf16;
    let run = TrainingRun { model, waves, labels: &labels, directory, save_every: 2, resume: true, fold };
    let mut told = 0;
    let trained = run.train_in_group(group, recipe, &mut |_| {
        told += 1;
        Ok(())
    })?;
    assert_eq!(told > 0, group.rank() == 0, "one rank tells what happens");
    match group.rank() {
        0 => trained.save(model, directory, Existing::Refuse).map(drop),
        _ => Ok(()),
    }
}

/// The tensors of what was saved.
fn saved(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for folder in ["adapter", "model"].map(|name| directory.join(name)).into_iter().filter(|folder| folder.exists()) {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|end| end == "safetensors") {
                files.push((path.strip_prefix(directory).unwrap().to_path_buf(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn ranks_train_to_the_files_of_one() {
    let base = model("qwen2_moe");
    let rows = waves(&base, 7);
    let directory = tempfile::tempdir().unwrap();
    for (name, json) in [
        (
            "lora",
            r#"{"method": {"type": "lora", "r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}}"#,
        ),
        ("full", r#"{"method": {"type": "full"}}"#),
        ("esft", r#"{"method": {"type": "esft", "score": "token", "threshold": 0.3}}"#),
    ] {
        let recipe = recipe(json);
        let whole = directory.path().join(name);
        Threads::run(1, |group| train(group, &base, &rows, &recipe, &whole).unwrap());
        let whole = saved(&whole);
        assert!(!whole.is_empty());
        for ranks in [2, 5] {
            let shared = directory.path().join(format!("{name}-{ranks}"));
            Threads::run(ranks, |group| train(group, &base, &rows, &recipe, &shared).unwrap());
            assert!(saved(&shared) == whole, "{name}, {ranks} ranks");
        }
    }
}

#[test]
fn methods_that_keep_more_of_a_wave_than_its_gradient_are_refused() {
    let base = model("qwen2_moe");
    let rows = waves(&base, 3);
    let directory = tempfile::tempdir().unwrap();
    for json in [
        r#"{"method": {"type": "loss_free"}}"#,
        r#"{"method": {"type": "own", "router": true}, "router_losses": {"z": 0.001}}"#,
    ] {
        let recipe = recipe(json);
        let at = directory.path().join("none");
        let all = Threads::run(2, |group| train(group, &base, &rows, &recipe, &at).unwrap_err().to_string());
        assert!(all.iter().all(|error| error.contains("they share the methods own, full, esft and lora")), "{all:?}");
        assert!(!at.exists(), "before anything is written");
    }
}
