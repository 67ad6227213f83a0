//! `moe merge`, flag by flag.

use std::fs;
use std::path::Path;

use moe_checkpoint::Checkpoint;
use moe_cli::TINY_MOE;
use moe_merge::{CompactModel, MergePlan};
use serde_json::{Value, json};

use crate::support::{contents, ok, refused, rows, text, words};

const SMALL: &str = "--samples 8 --length 48 --wave-tokens 128";

/// A model whose router has a bias.
const WITH_ROUTER_BIAS: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-checkpoint/tests/fixtures/parity/tf5/gpt_oss_bf16");

fn groups(path: &Path) -> Vec<usize> {
    MergePlan::load(path).unwrap().layers.iter().map(|layer| layer.groups.len()).collect()
}

#[test]
fn evidence_serves_every_budget_and_form() {
    let dir = tempfile::tempdir().unwrap();
    let (work, data) = (dir.path().join("work"), rows("arithmetic_calibration"));
    let other = format!("{}=1", rows("facts_calibration"));
    let first = format!("{data}=3");
    let merge = |name: &str, flags: &str| {
        let out = dir.path().join(name);
        let files =
            ["--model", TINY_MOE, "--data", &first, "--data", &other, "--work", text(&work), "--out", text(&out)];
        ok(&words(&format!("merge --recipe hc-smoe {SMALL} {flags}"), &files))
    };
    merge("planned", "--ratio 0.25 --plan-only");
    let plan = dir.path().join("planned.plan.json");
    assert!(groups(&plan).iter().all(|count| *count == 12), "{:?}", groups(&plan));
    assert!(!dir.path().join("planned").exists(), "only a plan was asked for");
    let evidence = work.join("evidence.safetensors");
    let made = fs::metadata(&evidence).unwrap().modified().unwrap();
    merge("ten", "--experts-per-layer 10 --form stock");
    let written = Checkpoint::open(dir.path().join("ten")).unwrap();
    assert!(written.shape().layers.iter().all(|layer| layer.num_experts() == 10));
    merge("grouped", "--ratio 0.25 --form grouped");
    assert_eq!(fs::metadata(&evidence).unwrap().modified().unwrap(), made, "the model ran once");
    assert_eq!(groups(&dir.path().join("grouped.plan.json")), groups(&plan));
    // Other rows give other evidence.
    let out = dir.path().join("answers");
    let files = ["--model", TINY_MOE, "--data", &data, "--work", text(&work), "--out", text(&out)];
    ok(&words(&format!("merge --recipe hc-smoe {SMALL} --loss answers --plan-only"), &files));
    assert_ne!(fs::metadata(&evidence).unwrap().modified().unwrap(), made);
}

#[test]
fn protected_experts_absorb_nobody_and_a_recipe_may_be_json() {
    let dir = tempfile::tempdir().unwrap();
    let (out, mask, data) = (dir.path().join("out"), dir.path().join("mask.json"), rows("arithmetic_calibration"));
    let layer = Checkpoint::open(TINY_MOE).unwrap().shape().layers[0].layer;
    fs::write(&mask, json!([{"layer": layer, "expert": 3}]).to_string()).unwrap();
    let recipe = serde_json::to_string(&moe_merge::Recipe::named("m-smoe").unwrap()).unwrap();
    let files =
        ["--model", TINY_MOE, "--data", &data, "--recipe", &recipe, "--protect", text(&mask), "--out", text(&out)];
    let flags = format!("merge {SMALL} --ratio 0.5");
    let line = words(&flags, &files);
    ok(&[&line[..], &["--check"]].concat());
    assert!(!out.exists() && !dir.path().join("out.work").exists(), "a check does nothing");
    ok(&line);
    let plan = MergePlan::load(dir.path().join("out.plan.json")).unwrap();
    assert!(plan.layers[0].protected(3));
    let (_, error) =
        refused(&words("merge --recipe hc-smoes --ratio 0.5", &["--model", TINY_MOE, "--data", &data, "--out", "x"]));
    assert!(error.contains("hc-smoes") && error.contains("sub-moe"), "{error}");
}

#[test]
fn parts_of_merged_experts_are_trained_by_flags() {
    let dir = tempfile::tempdir().unwrap();
    let (out, dense, data) = (dir.path().join("out"), dir.path().join("dense"), rows("arithmetic_calibration"));
    let files = ["--model", TINY_MOE, "--data", &data, "--dense", text(&dense), "--out", text(&out)];
    let flags = format!("merge {SMALL} --recipe mc-smoe --ratio 0.5 --form grouped --json");
    let settings = ["--train", r#"{"compression": {"rank": 8, "keep_rows": 0.1}}"#, "--steps", "3"];
    let report: Value = serde_json::from_str(&ok(&words(&flags, &[&files[..], &settings].concat()))).unwrap();
    assert_eq!(report["training"]["steps"], 3, "{report}");
    let [before, best] = [&report["training"]["before"], &report["training"]["best"]["value"]].map(Value::as_f64);
    assert!(best.unwrap() <= before.unwrap(), "{report}");
    let compact = CompactModel::open(dir.path().join("out.compact")).unwrap();
    assert_eq!(compact.compression().rank, 8);
    // The plain checkpoint holds what was trained: smaller experts, as many parameters as merged ones.
    let (merged, plain) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&dense).unwrap());
    assert_eq!(plain.parameters(), merged.parameters());
    assert_ne!(plain.expert(0, 0).unwrap().up, merged.expert(0, 0).unwrap().up);
    // Without training, other parts of the same size.
    let (closed, line) = (dir.path().join("closed"), ["--model", TINY_MOE, "--data", &data]);
    ok(&words(&flags, &[&line[..], &["--out", text(&closed)]].concat()));
    let closed = CompactModel::open(dir.path().join("closed.compact")).unwrap();
    assert_ne!(closed.compression().rank, 8, "the recipe's own");
    let (_, error) = refused(&words(&flags, &[&files[..], &["--train", r#"{"rnk": 8}"#, "--force"]].concat()));
    assert!(error.contains("--train") && error.contains("rnk"), "{error}");
    let (_, error) = refused(&words(&flags, &[&files[..], &["--steps", "3", "--force"]].concat()));
    assert!(error.contains("--train"), "{error}");
}

#[test]
fn a_model_with_a_bias_of_its_router_is_merged_layer_by_layer() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    let row = |seed: u32| json!({"input_ids": (0..24).map(|t| (7 * t + 13 * seed) % 60 + 1).collect::<Vec<u32>>()});
    fs::write(&data, (0..8).map(|seed| format!("{}\n", row(seed))).collect::<String>()).unwrap();
    let merge = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let files = [&["--model", WITH_ROUTER_BIAS, "--data", text(&data), "--out", text(&out)][..], more].concat();
        ok(&words("merge --recipe ream --ratio 0.5 --form stock --wave-tokens 64", &files));
        out
    };
    let (sequential, at_once) = (merge("sequential", &[]), merge("at-once", &["--at-once"]));
    let base = Checkpoint::open(WITH_ROUTER_BIAS).unwrap();
    assert!(base.config().routing.bias);
    let before = base.shape().layers[0].num_experts();
    for dir in [&sequential, &at_once] {
        let merged = Checkpoint::open(dir).unwrap();
        assert!(merged.config().routing.bias, "the bias stays");
        assert!(merged.shape().layers.iter().all(|layer| layer.num_experts() == before / 2));
    }
    // The first layer sees the same inputs either way; the later ones do not.
    assert_ne!(contents(&sequential), contents(&at_once));
    let again = merge("again", &[]);
    let weights =
        |dir: &Path| contents(dir).into_iter().filter(|(name, _)| name.ends_with("safetensors")).collect::<Vec<_>>();
    assert_eq!(weights(&sequential), weights(&again));
}

#[test]
fn evidence_that_is_shared_out_merges_as_that_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows("arithmetic_calibration");
    let at = |name: &str| dir.path().join(name);
    let arguments = |flags: &str, name: &str, more: &[&str]| {
        let line = format!("merge {flags} --ratio 0.25 {SMALL} --model {TINY_MOE} --data {data}");
        let own = ["--out".to_string(), text(&at(name)).to_string()];
        line.split_whitespace().map(String::from).chain(own).chain(more.iter().map(|m| m.to_string())).collect()
    };
    let run = |arguments: Vec<String>| ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let merge = |name: &str, more: &[&str]| run(arguments("--recipe hc-smoe", name, more));
    merge("whole", &[]);
    let (work0, work1, work) = (at("work0"), at("work1"), at("work"));
    let told = merge("a", &["--shard", "0/2", "--work", text(&work0)]);
    assert!(told.contains("a share of the evidence") && !at("a").exists(), "{told}");
    merge("b", &["--shard", "1/2", "--work", text(&work1)]);
    let taken = ["--absorb", text(&work0), "--absorb", text(&work1), "--work", text(&work)];
    merge("together", &taken);
    let model =
        |name: &str| contents(&at(name)).into_iter().filter(|(name, _)| name.ends_with("safetensors")).collect();
    let (whole, together): (Vec<_>, Vec<_>) = (model("whole"), model("together"));
    assert_eq!(whole, together);

    let refuse = |arguments: Vec<String>| refused(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let (_, error) = refuse(arguments("--recipe hc-smoe", "c", &["--shard", "0/2"]));
    assert!(error.contains("expected --work"), "{error}");
    let (_, error) = refuse(arguments("--recipe ream", "c", &["--shard", "0/2", "--work", text(&at("work2"))]));
    assert!(error.contains("layer by layer"), "{error}");
    let (_, error) = refuse(arguments("--recipe hc-smoe", "c", &["--absorb", text(&at("whole"))]));
    assert!(error.contains("found no evidence"), "{error}");
}

#[test]
fn what_was_killed_after_the_model_had_its_name_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let (out, kept, data) = (dir.path().join("out"), dir.path().join("kept"), rows("arithmetic_calibration"));
    let line = format!("merge --recipe hc-smoe --ratio 0.5 --form grouped {SMALL}");
    let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
    ok(&words(&line, &[&files[..], &["--work", text(&kept)]].concat()));
    let (model, report) = (contents(&out), dir.path().join("out.report.html"));
    let work = dir.path().join("out.work");
    // As it stands between the name of the model and the report.
    fs::rename(&kept, &work).unwrap();
    fs::remove_file(&report).unwrap();
    let again = [&files[..], &["--resume"]].concat();
    ok(&words(&line, &again));
    assert!(report.exists() && !work.exists());
    assert_eq!(contents(&out), model);
    // Done is done, and another model is not what the run was to write.
    assert!(refused(&words(&line, &again)).1.contains("exists"));
    fs::create_dir(&work).unwrap();
    let other = line.replace("0.5", "0.25");
    assert!(refused(&words(&other, &again)).1.contains("exists"));
    assert_eq!(contents(&out), model);
}
