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
#[path = "../examples/own_grouping.rs"]
#[allow(dead_code)]
mod own_grouping;
#[path = "../examples/own_pruner.rs"]
#[allow(dead_code)]
mod own_pruner;
#[path = "../examples/own_repair.rs"]
#[allow(dead_code)]
mod own_repair;
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
fn a_grouping_of_ones_own_merges_and_its_plan_can_be_read_and_applied_but_not_made_again() {
    let merged = own_grouping::run(TINY_MOE).unwrap();
    let record = merged.model().steps().last().unwrap().recipe.to_string();
    assert!(record.contains(r#""type":"dealt""#), "{record}");
    let json = serde_json::to_string(&moe_merge::GroupingConfig::own(own_grouping::Dealt)).unwrap();
    assert_eq!(json, r#"{"type":"own","recipe":{"type":"dealt"}}"#);
    let read: moe_merge::GroupingConfig = serde_json::from_str(&json).unwrap();
    assert_eq!(read, moe_merge::GroupingConfig::own(own_grouping::Dealt));
    let recipe = moe_merge::Recipe { grouping: read, ..moe_merge::Recipe::named("m-smoe").unwrap() };
    let base = moe_checkpoint::Checkpoint::open(TINY_MOE).unwrap();
    let evidence = moe_merge::Evidence::none(&base);
    let error = recipe.plan(&base, &evidence, &moe_checkpoint::ProtectionMask::none()).unwrap_err().to_string();
    assert!(error.contains("dealt") || error.contains("routing.tokens"), "{error}");
}

#[test]
fn a_repair_of_ones_own_makes_edits_that_are_recorded() {
    let (model, edits) = own_repair::run(TINY_MOE).unwrap();
    let shape = model.shape();
    let experts: usize = shape.layers.iter().map(|layer| layer.num_experts()).sum();
    assert!(edits.experts().count() > experts / 2, "{} of {experts}", edits.experts().count());
    assert_eq!(edits.recipe["repair"], "as_loud");
    // An expert is louder than the plan alone leaves it.
    let base = moe_checkpoint::Checkpoint::open(TINY_MOE).unwrap();
    let ((layer, expert), _) = edits.experts().next().unwrap();
    let (whole, left) = (base.expert(layer, expert).unwrap(), model.expert(layer, expert).unwrap());
    assert_eq!(left.width * 2, whole.width);
    let ratio = left.down[0] / whole.down[0];
    assert!(
        ratio > 1.0
            && left.down.iter().zip(whole.down.iter().step_by(2)).all(|(a, b)| (a - ratio * b).abs() <= 0.01 * b.abs())
    );
    let step = model.steps().last().unwrap();
    assert!(step.recipe["edits"].is_string(), "{}", step.recipe);
}
