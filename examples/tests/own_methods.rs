//! The examples of methods that are not of this workspace, run on the bundled model.

#[path = "../examples/own_pruner.rs"]
#[allow(dead_code)]
mod own_pruner;
#[path = "../examples/own_scorer.rs"]
#[allow(dead_code)]
mod own_scorer;

const TINY_MOE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-moe");

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
