//! Parts of merging and of repair that stand outside the workspace, in code as their authors would write it.

use moe_examples::TINY_MOE;

#[path = "own_methods/grouping.rs"]
mod grouping;
#[path = "own_methods/repair.rs"]
mod repair;

#[test]
fn a_grouping_of_ones_own_merges_and_its_plan_can_be_read_and_applied_but_not_made_again() {
    let merged = grouping::run(TINY_MOE).unwrap();
    let record = merged.model().steps().last().unwrap().recipe.to_string();
    assert!(record.contains(r#""type":"dealt""#), "{record}");
    let json = serde_json::to_string(&moe_merge::GroupingConfig::own(grouping::Dealt)).unwrap();
    assert_eq!(json, r#"{"type":"own","recipe":{"type":"dealt"}}"#);
    let read: moe_merge::GroupingConfig = serde_json::from_str(&json).unwrap();
    assert_eq!(read, moe_merge::GroupingConfig::own(grouping::Dealt));
    let recipe = moe_merge::Recipe { grouping: read, ..moe_merge::Recipe::named("m-smoe").unwrap() };
    let base = moe_checkpoint::Checkpoint::open(TINY_MOE).unwrap();
    let evidence = moe_merge::Evidence::none(&base);
    let error = recipe.plan(&base, &evidence, &moe_checkpoint::ProtectionMask::none()).unwrap_err().to_string();
    assert!(error.contains("dealt") || error.contains("routing.tokens"), "{error}");
}

#[test]
fn a_repair_of_ones_own_makes_edits_that_are_recorded() {
    let (model, edits) = repair::run(TINY_MOE).unwrap();
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
