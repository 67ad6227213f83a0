//! The examples, each run on the bundled model.

use std::path::Path;

use moe_examples::TINY_MOE;

#[path = "../examples/evaluate.rs"]
#[allow(dead_code)]
mod evaluate;
#[path = "../examples/generate.rs"]
#[allow(dead_code)]
mod generate;
#[path = "../examples/lora_recovery.rs"]
#[allow(dead_code)]
mod lora_recovery;
#[path = "../examples/merge_experts.rs"]
#[allow(dead_code)]
mod merge_experts;
#[path = "../examples/own_pruner.rs"]
#[allow(dead_code)]
mod own_pruner;
#[path = "../examples/own_scorer.rs"]
#[allow(dead_code)]
mod own_scorer;
#[path = "../examples/quantize.rs"]
#[allow(dead_code)]
mod quantize;
#[path = "../examples/reap_experts.rs"]
#[allow(dead_code)]
mod reap_experts;
#[path = "../examples/run_recipe.rs"]
#[allow(dead_code)]
mod run_recipe;
#[path = "../examples/score_prune_write.rs"]
#[allow(dead_code)]
mod score_prune_write;

#[test]
fn a_pruner_of_ones_own_plans_and_is_recorded() {
    let plan = own_pruner::run(TINY_MOE).unwrap();
    assert_eq!(plan.recipe["pruner"]["type"], "deeper");
    assert!(plan.ratio.achieved > 0.2 && plan.ratio.achieved <= 0.25, "{:?}", plan.ratio);
    let units: Vec<usize> = plan.kept.iter().map(|layer| layer.experts.iter().map(Vec::len).sum()).collect();
    assert!(units.windows(2).all(|pair| pair[0] > pair[1]), "{units:?}");
}

#[test]
fn a_scorer_of_ones_own_feeds_a_pruner_and_is_recorded() {
    let plan = own_scorer::run(TINY_MOE).unwrap();
    assert_eq!(plan.recipe["scorer"]["type"], "often_and_loud");
    assert!((plan.ratio.achieved - 0.25).abs() < 1e-9, "{:?}", plan.ratio);
    assert!(plan.kept.iter().all(|layer| layer.removed.len() * 4 == layer.experts.len()));
}

#[test]
fn score_prune_write_leaves_half_of_the_units() {
    let out = tempfile::tempdir().unwrap();
    let data = Path::new(TINY_MOE).join("data/arithmetic_calibration.jsonl");
    let (kept, whole) = score_prune_write::half(TINY_MOE, &data, &out.path().join("half")).unwrap();
    assert_eq!((kept, whole), (2_108_032, 3_287_680));
    let written = moe::checkpoint::Checkpoint::open(out.path().join("half")).unwrap();
    assert_eq!(written.parameters(), kept);
}

#[test]
fn reap_leaves_as_many_experts_in_each_layer() {
    let (before, after, left) = reap_experts::reap(TINY_MOE).unwrap();
    assert_eq!(left, [12; 4]);
    assert!(
        before.key == "arithmetic_exact" && before.value > 0.95 && after.value <= before.value,
        "{before:?} {after:?}"
    );
}

#[test]
fn merging_makes_the_model_smaller_and_prose_little_worse() {
    let ([before, after], [was, is]) = merge_experts::merged(TINY_MOE).unwrap();
    assert_eq!(before, 3_287_680);
    assert!(after < before && is > was && is < 2.0 * was, "{before} {after} {was} {is}");
}

#[test]
fn training_wins_sums_back() {
    let out = tempfile::tempdir().unwrap();
    let [whole, half, trained] = lora_recovery::recovered(TINY_MOE, 60, &out.path().join("lora")).unwrap();
    assert!(whole > 0.95 && half < 0.8 && trained > half, "{whole} {half} {trained}");
    assert!(out.path().join("lora/adapter/adapter_config.json").exists());
}

#[test]
fn every_capability_of_the_bundled_model_is_measured() {
    let found = evaluate::measured(TINY_MOE, 40).unwrap();
    let keys: Vec<&str> = found.iter().map(|found| found.key.as_str()).collect();
    assert_eq!(keys, ["arithmetic_exact", "facts_exact", "prose_ppl"]);
    assert!(found[0].value > 0.9 && found[1].value > 0.9 && found[2].value < 40.0, "{found:?}");
}

#[test]
fn eight_bits_cost_prose_nothing_to_speak_of() {
    let out = tempfile::tempdir().unwrap();
    let ([before, after], [was, is]) = quantize::quantized(TINY_MOE, &out.path().join("int8")).unwrap();
    assert!(after < before && (is / was - 1.0).abs() < 0.02, "{before} {after} {was} {is}");
    assert_eq!(moe::checkpoint::Checkpoint::open(out.path().join("int8")).unwrap().bytes_on_disk(), after);
}

#[test]
fn a_recipe_is_run_and_reported() {
    let out = tempfile::tempdir().unwrap();
    let report = run_recipe::chain(TINY_MOE, &out.path().join("recipe")).unwrap();
    let steps: Vec<&str> = report.steps.iter().map(|step| step.step.as_str()).collect();
    assert_eq!(steps, ["evaluate", "score", "prune", "repair", "evaluate", "write"]);
    let html = std::fs::read_to_string(out.path().join("recipe/report.html")).unwrap();
    for measured in report.steps.iter().flat_map(|step| &step.measured) {
        assert!(html.contains(&format!(">{:.4}</td>", measured.value)), "{measured:?} is not in the report");
    }
}

#[test]
fn a_sum_is_continued_with_its_answer() {
    let prompt = "Question: Vic finds 36 plums, then 20 more, and loses 7. How many plums remain?\nAnswer:";
    assert!(generate::continued(TINY_MOE, prompt).unwrap().contains("#### 49"));
}

#[test]
fn there_are_eight_to_twelve_examples_of_20_to_60_lines_and_each_is_run_here_or_beside() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let here = std::fs::read_to_string(dir.join("tests/examples.rs")).unwrap();
    // Programs whose jobs have test files of their own.
    let beside = ["fisher_prune_qwen", "finetune_qwen"];
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir.join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!((20..=60).contains(&lines), "{}: {lines} lines", path.display());
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        let run = beside.contains(&name.as_str()) || here.contains(&format!("{name}::"));
        assert!(run, "{name}: no test runs it");
        names.push(name);
    }
    assert!((8..=12).contains(&names.len()), "{}: {names:?}", names.len());
}
