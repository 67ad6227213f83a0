//! Recipes that the ranks of a group carry out: the artifacts and the model of one process for any number of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe::progress::Progress;
use moe::recipe::Recipe;
use moe::run::{RunOptions, run};
use moe_checkpoint::group::{Group, Threads};
use serde_json::{Value, json};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn recipe(out: &Path, steps: &Value) -> Recipe {
    let data = model().join("data");
    let recipe = json!({
        "model": model(),
        "out": out,
        "data": {
            "calibration": [data.join("facts_calibration.jsonl")],
            "samples": 12,
            "length": 24,
            "wave_tokens": 64,
            "eval": [data.join("facts_test.jsonl"), data.join("prose_test.jsonl")],
        },
        "steps": steps,
    });
    serde_json::from_value(recipe).unwrap()
}

/// Files below a folder, but for those with times or paths in them.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let differ = ["report.html", "report.json", "recipe.json", "training.json", "training.jsonl"];
    let (mut found, mut folders) = (BTreeMap::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "training" {
                folders.push(path);
            } else if path.is_file() && !differ.contains(&name.as_str()) {
                found.insert(path.strip_prefix(folder).unwrap().to_path_buf(), fs::read(path).unwrap());
            }
        }
    }
    found
}

fn same_for_any_number(steps: &Value) {
    let directory = tempfile::tempdir().unwrap();
    let at = |ranks: usize| directory.path().join(format!("out-{ranks}"));
    let whole = run(&recipe(&at(1), steps), RunOptions::new(Progress::hidden())).unwrap();
    let expected = files(&at(1));
    for ranks in [2, 3, 5] {
        let recipe = recipe(&at(ranks), steps);
        let options = RunOptions::new(Progress::hidden());
        let reports = Threads::run(ranks, |group| run(&recipe, RunOptions { group, ..options }).unwrap());
        let found = files(&at(ranks));
        let differ: Vec<_> =
            expected.keys().chain(found.keys()).filter(|k| expected.get(*k) != found.get(*k)).collect();
        assert!(differ.is_empty(), "{ranks} ranks: {differ:?}");
        for (step, of_one) in reports[0].steps.iter().zip(&whole.steps) {
            assert_eq!((&step.step, &step.measured), (&of_one.step, &of_one.measured), "{ranks} ranks");
        }
        // Once more: everything is there.
        let again = Threads::run(ranks, |group| run(&recipe, RunOptions { group, resume: true, ..options }).unwrap());
        assert!(again[0].steps.iter().filter(|step| step.artifact.is_some()).all(|step| step.reused), "{:?}", again[0]);
    }
}

#[test]
fn a_chain_of_pruning_has_the_bytes_of_one_process() {
    let options = json!({"rows": 6, "max_new_tokens": 4});
    same_for_any_number(&json!([
        {"evaluate": {"options": options}},
        {"score": {"scorers": ["fisher", "reap"], "super_experts": "default"}},
        {"prune": {"scores": "fisher", "budget": {"ratio": 0.5}, "form": "ragged"}},
        {"repair": {"type": "refit"}},
        {"repair": {"type": "layer_refit"}},
        {"repair": {"type": "router_distillation", "train": {"epochs": 1}}},
        {"tune": {"method": "lora", "steps": 3, "step_tokens": 64}},
        {"evaluate": {"options": options}},
        {"write": {}},
    ]));
}

#[test]
fn a_chain_of_merging_has_the_bytes_of_one_process() {
    same_for_any_number(&json!([
        {"merge": {"recipe": "ream", "amount": {"ratio": 0.5}, "form": "stock"}},
        {"sparsify": {"sparsity": {"unstructured": 0.5}}},
        {"quantize": {"format": {"type": "int", "bits": 4, "group_size": 32}, "calibrated": true}},
        {"write": {}},
    ]));
}

#[test]
fn what_a_rank_lacks_stops_all_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let steps = json!([{"score": {"scorers": ["reap"]}}]);
    let options = RunOptions::new(Progress::hidden());
    let apart = Threads::run(3, |group| {
        let out = directory.path().join(if group.rank() == 2 { "other" } else { "out" });
        run(&recipe(&out, &steps), RunOptions { group, ..options }).unwrap_err().to_string()
    });
    assert!(apart.iter().all(|error| error.contains("recipe: found")), "{apart:?}");
    assert!(fs::read_dir(directory.path()).unwrap().next().is_none(), "nothing was begun");
    let shards = Threads::run(2, |group| {
        let options = RunOptions { group, shard: Some((0, 2)), ..options };
        run(&recipe(&directory.path().join("out"), &steps), options).unwrap_err().to_string()
    });
    assert!(shards.iter().all(|error| error.contains("2 processes")), "{shards:?}");
}
