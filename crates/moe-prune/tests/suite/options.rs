//! What else one may ask of a plan: bytes of the whole checkpoint, multiples, lists of what stays.

use crate::common;
use crate::synthetic;

use std::sync::Arc;

use common::{magnitude, parity, tiny_moe, write_plan};
use moe_checkpoint::{Checkpoint, ExpertPart, Reduction};
use moe_prune::{
    AllocatorConfig, Budget, ExpertPruner, Global, PerLayer, ProtectionMask, PruneForm, PruneOptions, PrunePlan,
    Pruner, Scope, SubsetPruner, UnitPruner,
};
use synthetic::Noise;
use tempfile::tempdir;

/// Bytes of one unit as it is written.
fn unit_bytes(model: &Checkpoint) -> u64 {
    let (layer, hidden) = (model.shape().layers[0].layer, model.shape().hidden_size as u64);
    let bytes = |part, len| model.expert_dtype(layer, 0, part).unwrap().map_or(0, |d| len * d.bitsize() as u64 / 8);
    let biases = bytes(ExpertPart::GateBias, 1) + bytes(ExpertPart::UpBias, 1);
    ExpertPart::ALL.into_iter().map(|part| bytes(part, hidden)).sum::<u64>() + biases
}

#[test]
fn a_checkpoint_of_so_many_bytes_has_no_more_and_hardly_less() {
    let directory = tempdir().unwrap();
    let fixtures = [tiny_moe(), parity("tf5/gpt_oss"), parity("tf5/gpt_oss_mxfp4"), parity("tf4/deepseek_v2")];
    for (index, dir) in fixtures.into_iter().filter(|dir| dir.exists()).enumerate() {
        let model = Arc::new(Checkpoint::open(&dir).unwrap());
        let written = model.dequantized().unwrap();
        let asked = written.bytes_on_disk() - written.shape().units() as u64 * unit_bytes(&written) * 2 / 5 - 1;
        // The ragged form is BF16, whatever the base is.
        let budget = Budget::KeepBytes(asked).resolve_as(&model, false).unwrap();
        if model.quantization().is_some() {
            // As many bytes are less of the model in BF16 than of the model as it is stored, or are none of it.
            let bytes = Budget::KeepBytes(model.bytes_on_disk() - 1);
            let kept = |found: moe_prune::Result<Budget>| match found {
                Ok(Budget::KeepParameters(parameters)) => parameters,
                Ok(other) => panic!("{other:?}"),
                Err(_) => 0,
            };
            assert!(kept(bytes.resolve_as(&model, false)) < kept(bytes.resolve_as(&model, true)));
        }
        let scores = magnitude(&model);
        let pruner = UnitPruner::new(Scope::Global);
        let none = ProtectionMask::none();
        let refused = pruner.prune(&scores, model.shape(), Budget::KeepBytes(asked), &none).unwrap_err().to_string();
        assert!(refused.contains("Budget::resolve"), "{refused}");
        let plan = pruner.prune(&scores, model.shape(), budget, &none).unwrap().plan;
        let out = directory.path().join(index.to_string());
        write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap();
        let bytes = Checkpoint::open(&out).unwrap().bytes_on_disk();
        assert!(bytes <= asked && bytes + unit_bytes(&written) > asked, "{}: {bytes} of {asked}", dir.display());

        let asked = model.parameters() - model.shape().parameters() / 2;
        let budget = Budget::KeepTotalParameters(asked).resolve(&model).unwrap();
        let plan = pruner.prune(&scores, model.shape(), budget, &none).unwrap().plan;
        let per_unit = model.shape().parameters_per_unit() as u64;
        let left = model.parameters() - (model.shape().units() - plan.units_kept()) as u64 * per_unit;
        assert!(left <= asked && left + per_unit > asked, "{}: {left} of {asked}", dir.display());
    }
}

#[test]
fn a_budget_that_cannot_be_or_is_met_already_says_what_there_is() {
    let model = Arc::new(Checkpoint::open(tiny_moe()).unwrap());
    let total = model.bytes_on_disk();
    for asked in [0, 1, total, total + 1] {
        let error = Budget::KeepBytes(asked).resolve(&model).unwrap_err().to_string();
        assert!(error.contains("keep_bytes") && error.contains(&format!("{total} bytes")), "{error}");
        let error = Budget::KeepTotalParameters(asked.min(1) * u64::MAX).resolve(&model).unwrap_err().to_string();
        assert!(error.contains("keep_total_parameters"), "{error}");
    }
    assert_eq!(Budget::Ratio(0.5).resolve(&model).unwrap(), Budget::Ratio(0.5));
}

#[test]
fn every_layer_keeps_a_multiple_of_experts() {
    let shape = moe_checkpoint::MoeShape { top_k: 2, ..synthetic::shape(3, 24, 4) };
    let (scores, none) = (Noise(8).experts(&shape), ProtectionMask::none());
    let allocators = [
        AllocatorConfig::Uniform(Default::default()),
        AllocatorConfig::Layer(PerLayer::default()),
        AllocatorConfig::Global(Global::default()),
    ];
    for allocator in allocators {
        for (multiple, groups) in [(8, 1), (4, 1), (4, 3), (6, 4)] {
            let pruner = ExpertPruner::with_allocator(allocator.clone()).multiple_of(multiple).groups(groups);
            let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.45), &none).unwrap().plan;
            for layer in &plan.kept {
                let kept = layer.experts_kept();
                assert!(kept.len().is_multiple_of(multiple) && kept.len() >= 2, "{allocator:?}: {}", kept.len());
                let size = 24 / groups;
                let of = |group: usize| kept.iter().filter(|expert| **expert / size == group).count();
                assert!((0..groups).all(|group| of(group) == of(0)), "{allocator:?}");
            }
            let dropped = shape.units() - plan.units_kept();
            assert!(dropped <= (shape.units() as f64 * 0.45) as usize, "{allocator:?}: {dropped}");
            assert_eq!(plan.recipe["pruner"]["multiple_of"], multiple);
        }
    }
    // 20 of 24 are protected: 24 have to stay, and no multiple of 10 is as many as 21.
    let mut protect = ProtectionMask::none();
    (0..20).for_each(|expert| protect.protect_expert(1, expert));
    let pruner = ExpertPruner::default().multiple_of(8);
    let error = pruner.prune(&scores, &shape, Budget::Ratio(0.4), &protect).unwrap_err().to_string();
    assert!(error.contains("infeasible"), "{error}");
    protect.protect_expert(1, 20);
    let error = pruner.clone().multiple_of(10).prune(&scores, &shape, Budget::Ratio(0.1), &protect).unwrap_err();
    assert!(error.to_string().contains("multiple of 10"), "{error}");
    // What is no multiple goes whatever the ratio, and is told.
    let told = pruner.multiple_of(10).prune(&scores, &shape, Budget::Ratio(0.1), &none).unwrap().plan;
    assert!(told.kept.iter().all(|layer| layer.experts_kept().len() == 20));
    assert!(told.notes[0].contains("multiples of 10") && told.notes[0].contains("48 units"), "{:?}", told.notes);
    let error = ExpertPruner::default().multiple_of(0).prune(&scores, &shape, Budget::Ratio(0.1), &none).unwrap_err();
    assert!(error.to_string().contains("multiple_of is 0"), "{error}");
    assert_eq!(SubsetPruner::default().multiple_of, 1);
}

#[test]
fn a_list_says_what_stays() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen2_moe")).unwrap();
    let shape = model.shape();
    let (first, experts) = (shape.layers[0].layer, shape.layers[0].num_experts());
    let json = format!(
        r#"[{{"layer":{first},"expert":0}},{{"layer":{first},"expert":2,"units":[1,3]}},{{"layer":{first},"expert":3}}]"#
    );
    let list: ProtectionMask = serde_json::from_str(&json).unwrap();
    let plan = PrunePlan::keep_only(shape, model.fingerprint(), &list).unwrap();
    assert_eq!(plan.kept[0].experts_kept(), [0, 2, 3]);
    assert_eq!(plan.kept[0].experts[2], [1, 3]);
    assert_eq!(plan.kept[0].removed.len(), experts - 3);
    assert!(plan.kept[1..].iter().all(|layer| layer.removed.is_empty()));
    assert_eq!(PrunePlan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
    let out = directory.path().join("out");
    write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    let width = shape.layers[0].widths[0];
    assert_eq!(written.shape().layers[0].widths, [width, 2, width]);
    assert_eq!(written.expert(first, 2).unwrap(), model.expert(first, 3).unwrap());
    assert_eq!(written.expert(first, 1).unwrap(), model.expert(first, 2).unwrap().select_units(&[1, 3]).unwrap());
    let error = PrunePlan::keep_only(shape, "", &ProtectionMask::none()).unwrap_err().to_string();
    assert!(error.contains("empty"), "{error}");
    let mut unknown = ProtectionMask::none();
    unknown.protect_expert(first, experts);
    let error = PrunePlan::keep_only(shape, "", &unknown).unwrap_err().to_string();
    assert!(error.contains(&format!("the layer has {experts} experts")), "{error}");
    // A whole-expert list is the pruning of experts by hand.
    let scores = magnitude(&model).to_experts(Reduction::Sum).unwrap();
    let by_scores =
        ExpertPruner::new().prune(&scores, shape, Budget::Ratio(0.25), &ProtectionMask::none()).unwrap().plan;
    let mut list = ProtectionMask::none();
    for layer in &by_scores.kept {
        layer.experts_kept().into_iter().for_each(|expert| list.protect_expert(layer.layer, expert));
    }
    assert_eq!(PrunePlan::keep_only(shape, model.fingerprint(), &list).unwrap().kept, by_scores.kept);
}
