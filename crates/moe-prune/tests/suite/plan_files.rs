//! Plan files: round trip, and errors for everything that is not a plan of this model.

use moe_checkpoint::{MoeLayerShape, MoeShape};
use moe_prune::{Error, PLAN_VERSION, PrunePlan};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::tempdir;

fn shape() -> MoeShape {
    let layers = vec![MoeLayerShape { layer: 1, widths: vec![4, 4] }, MoeLayerShape { layer: 3, widths: vec![4, 0] }];
    MoeShape { gateless: false, hidden_size: 8, top_k: 2, layers }
}

fn plan() -> PrunePlan {
    let mut plan = PrunePlan::keep_all(&shape(), "fingerprint");
    plan.kept[0].experts = vec![vec![0, 3], vec![]];
    plan.ratio.asked = 0.5;
    plan.ratio.achieved = 0.5;
    plan
}

proptest! {
    #[test]
    fn round_trip(masks in prop::collection::vec(any::<u8>(), 3), asked in 0.0f64..1.0) {
        let mut plan = PrunePlan::keep_all(&shape(), "fingerprint");
        let kept = |mask: u8| (0..4u32).filter(|unit| mask & (1 << unit) != 0).collect::<Vec<_>>();
        plan.kept[0].experts = vec![kept(masks[0]), kept(masks[1])];
        plan.kept[1].experts[0] = kept(masks[2]);
        plan.ratio.asked = asked;
        plan.ratio.achieved = (12 - plan.units_kept()) as f64 / 12.0;
        let directory = tempdir().unwrap();
        let path = directory.path().join("plan.json");
        plan.save(&path).unwrap();
        let read = PrunePlan::load(&path).unwrap();
        prop_assert_eq!(&read.kept, &plan.kept);
        prop_assert_eq!(&read.shape, &plan.shape);
        prop_assert!((read.ratio.asked - asked).abs() < 1e-12);
        read.validate(&shape()).unwrap();
    }

    #[test]
    fn cut_files_are_errors(cut in 0usize..600) {
        let json = plan().to_json().unwrap();
        prop_assert!(PrunePlan::from_json(&json[..cut.min(json.len() - 1)]).is_err());
    }
}

#[test]
fn keep_all_keeps_all() {
    let plan = PrunePlan::keep_all(&shape(), "fingerprint");
    plan.validate(&shape()).unwrap();
    assert_eq!((plan.units_kept(), plan.pruned_shape()), (12, shape()));
    assert_eq!(plan.layer(3).unwrap().experts, [vec![0, 1, 2, 3], vec![]]);
    assert!(plan.layer(2).is_none());
}

#[test]
fn malformed_plans_say_what_is_wrong() {
    type Edit = fn(&mut Value);
    let cases: [(Edit, &str); 10] = [
        (|p| p["kept"][0]["experts"][0] = json!([3, 0]), "layer 1, expert 0: unit 3 stands before 0"),
        (|p| p["kept"][0]["experts"][0] = json!([0, 0]), "strictly ascending"),
        (|p| p["kept"][0]["experts"][0] = json!([0, 4]), "unit 4, but it has 4 units"),
        (|p| p["kept"][0]["experts"] = json!([[0]]), "kept units of 1 experts"),
        (|p| p["kept"][1]["layer"] = json!(2), "MoE layers [1, 2]"),
        (|p| p["kept"][0]["experts"][0] = json!([-1]), "invalid value"),
        (|p| p["ratio"]["achieved"] = json!(0.25), "ratio.achieved"),
        (|p| p["ratio"]["asked"] = json!(1.5), "ratio.asked"),
        (|p| p["shape"]["top_k"] = json!(3), "top_k"),
        (|p| drop(p.as_object_mut().unwrap().remove("model")), "missing field `model`"),
    ];
    let directory = tempdir().unwrap();
    let path = directory.path().join("plan.json");
    for (edit, part) in cases {
        let mut value: Value = serde_json::from_str(&plan().to_json().unwrap()).unwrap();
        edit(&mut value);
        std::fs::write(&path, value.to_string()).unwrap();
        let error = PrunePlan::load(&path).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::InvalidPlan { .. }), "{message}");
        assert!(message.contains(part) && message.contains("plan.json"), "{message}");
    }
}

#[test]
fn newer_plans_are_told_apart() {
    let json = json!({ "version": PLAN_VERSION + 1, "other": "fields" }).to_string();
    assert!(matches!(PrunePlan::from_json(&json), Err(Error::PlanVersion { found: 3, supported: 2, .. })));
    assert!(matches!(PrunePlan::load("/nonexistent/plan.json"), Err(Error::Io { .. })));
}

#[test]
fn a_plan_for_another_shape_says_what_differs() {
    type Edit = fn(&mut MoeShape);
    let cases: [(Edit, &str); 6] = [
        (|s| s.hidden_size = 9, "hidden_size 8, but the model has 9"),
        (|s| s.top_k = 1, "top_k 2, but the model has 1"),
        (|s| s.layers[0].layer = 0, "MoE layer 1, but the model has 0"),
        (|s| s.layers[0].widths.push(4), "2 experts in layer 1, but the model has 3"),
        (|s| s.layers[1].widths[1] = 1, "in layer 3"),
        (|s| drop(s.layers.pop()), "2 MoE layers, but the model has 1"),
    ];
    for (edit, part) in cases {
        let mut other = shape();
        edit(&mut other);
        let message = plan().validate(&other).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}
