//! Plans as overlays, and probes of real models.
#![cfg(feature = "repair")]

use crate::common;
use crate::run;

use std::sync::Arc;

use common::{magnitude, parity, plan, write_plan};
use moe_checkpoint::{Checkpoint, Reduction};
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::evaluate::divergence;
use moe_core::{Engine, EngineOptions, Model, TeacherLogits};
use moe_prune::{
    Allocator, AllocatorConfig, Budget, CurveSource, DistortionCurves, EngineProbe, Evolution, ExpertEdit,
    ExpertLimits, ExpertPruner, Global, Limits, ModelProbe, NovicePruner, PlanOverlay, ProbeOptions, ProtectionMask,
    PruneForm, PruneOptions, PrunePlan, PruneRequest, Pruner, RateDistortion, Rco, Scope, Statistic, SubsetPruner,
    UnitPruner, Within,
};
use run::{difference, logits, logits_of, wave};
use tempfile::tempdir;

/// Softmax and sigmoid routing, correction bias, groups, top-k before softmax with biases everywhere, sparsemixer.
const FAMILIES: [&str; 9] = [
    "tf5/qwen2_moe",
    "tf5/qwen3_moe",
    "tf5/mixtral",
    "tf5/deepseek_v2_group",
    "tf5/deepseek_v3",
    "tf5/glm4_moe",
    "tf5/gpt_oss",
    "tf5/ernie4_5_moe",
    "tf5/phimoe",
];

fn open(name: &str) -> Model {
    Model::open(parity(name), &device("flex").unwrap(), None).unwrap()
}

fn waves(vocabulary: usize) -> Vec<Wave> {
    let second = (0..20).map(|i| ((i * i * 13 + i * 5 + 3) % vocabulary) as u32).collect();
    vec![wave(vocabulary), Wave { id: 1, sequences: vec![Sequence::new(second)] }]
}

fn expert_plan(checkpoint: &Checkpoint, allocator: AllocatorConfig, ratio: f64) -> moe_prune::Result<PrunePlan> {
    let scores = magnitude(checkpoint).to_experts(Reduction::Sum).unwrap();
    let pruner = ExpertPruner::with_allocator(allocator).for_routing(&checkpoint.config().routing);
    Ok(pruner.prune(&scores, checkpoint.shape(), Budget::Ratio(ratio), &ProtectionMask::none())?.plan)
}

#[test]
fn an_overlay_is_the_applied_checkpoint() {
    let directory = tempdir().unwrap();
    for name in FAMILIES {
        let model = open(name);
        let checkpoint = model.checkpoint().clone();
        let mut plans = vec![
            ("uniform units", plan(&checkpoint, Scope::Expert, 0.4), PruneForm::Uniform),
            ("ragged units", plan(&checkpoint, Scope::Global, 0.5), PruneForm::Ragged),
            ("masked units", plan(&checkpoint, Scope::Layer, 0.6), PruneForm::Masked),
        ];
        let experts = expert_plan(&checkpoint, AllocatorConfig::Uniform(Default::default()), 0.5);
        // Routing by groups of two leaves nothing to remove where groups are ranked by their two best.
        if let Ok(plan) = experts {
            plans.push(("experts", plan, PruneForm::Ragged));
        } else {
            assert!(checkpoint.config().routing.groups().is_some(), "{name}");
        }
        for (what, plan, mode) in plans {
            let out = directory.path().join(format!("{}-{}", name.replace('/', "-"), what.replace(' ', "-")));
            write_plan(&plan, &checkpoint, &out, &PruneOptions { allow_unaligned: true, ..PruneOptions::new(mode) })
                .unwrap();
            let seen = logits_of(&PlanOverlay::new(&plan).of(&model).unwrap());
            let found = difference(&seen, &logits(&out));
            assert!(found < 2e-5, "{name}, {what}: {found}");
            assert!(difference(&seen, &logits_of(&model)) > 1e-3, "{name}, {what}: the plan changes nothing");
        }
        let keep = PlanOverlay::new(&PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint()));
        assert!(difference(&logits_of(&keep.of(&model).unwrap()), &logits_of(&model)) < 2e-5, "{name}");
    }
}

#[test]
fn an_expert_count_per_layer_is_ragged_only() {
    let directory = tempdir().unwrap();
    let model = open("tf5/mixtral");
    let checkpoint = model.checkpoint().clone();
    let mut uneven = magnitude(&checkpoint).to_experts(Reduction::Sum).unwrap();
    uneven.layers[0].scores.iter_mut().flatten().for_each(|score| *score *= 100.0);
    let pruner = ExpertPruner::with_allocator(AllocatorConfig::Global(Global::default()));
    let none = ProtectionMask::none();
    let found = pruner.prune(&uneven, checkpoint.shape(), Budget::Ratio(0.2), &none).unwrap();
    assert_eq!(found.allocation.uniform_experts(), None);
    let out = directory.path().join("out");
    let error =
        write_plan(&found.plan, &checkpoint, &out, &PruneOptions::new(PruneForm::Uniform)).unwrap_err().to_string();
    assert!(error.contains("one number of experts for all layers") && error.contains("ragged"), "{error}");
    write_plan(&found.plan, &checkpoint, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap();
    let seen = logits_of(&PlanOverlay::new(&found.plan).of(&model).unwrap());
    assert!(difference(&seen, &logits(&out)) < 2e-5);
}

#[test]
fn a_layer_with_fewer_experts_than_the_router_selects_routes_alike_in_a_search_and_in_what_is_written() {
    let directory = tempdir().unwrap();
    for name in ["tf5/mixtral", "tf5/qwen2_moe", "tf5/gpt_oss", "tf5/glm4_moe"] {
        let model = open(name);
        let checkpoint = model.checkpoint().clone();
        let mut plan = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
        let top_k = plan.shape.top_k;
        assert!(top_k > 1 && plan.kept.len() > 1, "{name}");
        // One layer has too few left, the others lose nothing.
        let first = &mut plan.kept[0];
        for expert in top_k - 1..first.experts.len() {
            first.experts[expert].clear();
            first.removed.push(expert as u32);
        }
        plan.ratio.achieved = 1.0 - plan.units_kept() as f64 / plan.shape.units() as f64;
        let out = directory.path().join(name.replace('/', "-"));
        write_plan(&plan, &checkpoint, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap();
        assert_eq!(moe_checkpoint::Checkpoint::open(&out).unwrap().config().routing.top_k, top_k - 1, "{name}");
        let seen = logits_of(&PlanOverlay::new(&plan).of(&model).unwrap());
        let found = difference(&seen, &logits(&out));
        assert!(found < 2e-5, "{name}: {found}");
    }
}

#[test]
fn edits_are_part_of_the_model_of_a_plan() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen2_moe_bf16", "tf5/gpt_oss", "tf5/deepseek_v3"] {
        let model = open(name);
        let checkpoint = model.checkpoint().clone();
        let hidden = checkpoint.shape().hidden_size;
        // Novices: one expert of every layer gives a constant, another has other weights; the router is another.
        let scores = magnitude(&checkpoint).to_experts(Reduction::Sum).unwrap();
        let none = ProtectionMask::none();
        let plan = NovicePruner::default().prune(&scores, checkpoint.shape(), Budget::Ratio(0.4), &none).unwrap().plan;
        let mut edits = moe_prune::Edits::new();
        for layer in &plan.kept {
            for (expert, kept) in layer.experts.iter().enumerate() {
                let value = |i: usize| ((i * 31 + expert * 7) % 13) as f32 / 40.0 - 0.15;
                let down_bias = kept.is_empty().then(|| (0..hidden).map(value).collect());
                let down = (expert == 1).then(|| (0..hidden * kept.len()).map(value).collect());
                edits.set_expert(layer.layer, expert, ExpertEdit { down, down_bias });
            }
            let weight = (0..layer.experts.len() * hidden).map(|i| ((i * 17) % 29) as f32 / 60.0 - 0.2).collect();
            edits.set_router(layer.layer, weight);
        }
        let out = directory.path().join(name.replace('/', "-"));
        let shared: Arc<dyn moe_prune::EditSource> = Arc::new(edits);
        let options = PruneOptions { edits: Some(shared), ..PruneOptions::new(PruneForm::Ragged) };
        write_plan(&plan, &checkpoint, &out, &options).unwrap();
        let pruned = plan.on(&checkpoint, &options).unwrap();
        let seen = logits_of(&Model::new(pruned.model().clone(), model.device(), None).unwrap());
        assert_eq!(seen, logits(&out), "{name}");
        let plain = logits_of(&PlanOverlay::new(&plan).of(&model).unwrap());
        assert!(difference(&seen, &plain) > 1e-3, "{name}: the edits change nothing");
        let narrower = common::plan(&checkpoint, Scope::Expert, 0.5);
        let refused = narrower.on(&checkpoint, &options);
        assert!(refused.is_err_and(|error| error.to_string().contains("down has")), "{name}");
    }
}

#[test]
fn a_probe_measures_what_evaluation_does() {
    let model = open("tf5/qwen2_moe");
    let checkpoint = model.checkpoint().clone();
    let engine = Engine::new(&model, EngineOptions::default());
    let waves = waves(model.config().vocab_size);
    let mut probe = EngineProbe::new(&engine, waves.clone(), ProbeOptions::default()).unwrap();
    let keep = PrunePlan::keep_all(checkpoint.shape(), "");
    let intact = probe.distortion(&keep.kept).unwrap();
    assert!(intact.mean.abs() < 1e-6 && (intact.overlap - 1.0).abs() < 1e-5, "{intact:?}");
    let plan = plan(&checkpoint, Scope::Global, 0.6);
    let found = probe.distortion(&plan.kept).unwrap();
    let teacher = TeacherLogits::record(&engine, &waves, usize::MAX).unwrap();
    let pruned = PlanOverlay::new(&plan).of(&model).unwrap();
    let expected = divergence(&pruned, &teacher, &waves).unwrap();
    assert!((found.mean - expected).abs() < 1e-9 && found.mean > 1e-4);
    assert!(found.worst > found.mean && found.overlap < 1.0);
    // Pinsker: the total variation distance is at most sqrt(KL / 2), also of means.
    assert!(1.0 - found.overlap <= (found.mean / 2.0).sqrt());
    let mut short = EngineProbe::new(&engine, waves.clone(), ProbeOptions { top: 5, batch_waves: 1 }).unwrap();
    let bound = short.distortion(&plan.kept).unwrap();
    assert!(bound.mean < found.mean && bound.overlap > found.overlap);
    let silent = vec![Wave { id: 0, sequences: vec![Sequence::new(vec![1])] }];
    assert!(EngineProbe::new(&engine, silent, ProbeOptions::default()).is_err());
    let engine = Engine::new(&pruned, EngineOptions::default());
    assert!(EngineProbe::new(&engine, waves, ProbeOptions::default()).unwrap_err().to_string().contains("full model"));
}

#[test]
fn gradients_of_gains_are_difference_quotients() {
    let model = open("tf5/deepseek_v3");
    let shape = model.checkpoint().shape().clone();
    let engine = Engine::new(&model, EngineOptions::default());
    let waves = waves(model.config().vocab_size);
    let options = ProbeOptions { batch_waves: 1, ..ProbeOptions::default() };
    let mut probe = EngineProbe::new(&engine, waves.clone(), options).unwrap();
    // Half of the experts at half, one at nothing.
    let gain = |e: usize| if e == 1 { 0.0 } else { 1.0 - 0.5 * (e % 2) as f32 };
    let mut gains: Vec<Vec<f32>> = shape.layers.iter().map(|l| (0..l.num_experts()).map(gain).collect()).collect();
    for batch in [0, 1] {
        let (_, gradient) = probe.gain_gradient(&gains, batch).unwrap();
        let scale = gradient.iter().flatten().fold(0.0f32, |max, d| max.max(d.abs()));
        assert!(scale > 0.0);
        for (layer, expert) in [(0, 0), (0, 1), (1, 3), (1, 1)] {
            let mut at = |value: f32| {
                let before = std::mem::replace(&mut gains[layer][expert], value);
                let found = probe.gain_gradient(&gains, batch).unwrap().0;
                gains[layer][expert] = before;
                found
            };
            let here = gain(expert);
            let quotient = (at(here + 0.02) - at(here - 0.02)) / 0.04;
            let found = f64::from(gradient[layer][expert]);
            assert!((quotient - found).abs() < 0.02 * f64::from(scale), "({layer}, {expert}): {found} {quotient}");
        }
    }
    // Batches go round.
    assert_eq!(probe.gain_gradient(&gains, 0).unwrap(), probe.gain_gradient(&gains, 2).unwrap());
    assert_ne!(probe.gain_gradient(&gains, 0).unwrap(), probe.gain_gradient(&gains, 1).unwrap());
}

#[test]
fn errors_of_a_layer_see_what_was_settled() {
    let model = open("tf5/mixtral");
    let engine = Engine::new(&model, EngineOptions::default());
    let waves = waves(model.config().vocab_size);
    let mut probe = EngineProbe::new(&engine, waves, ProbeOptions::default()).unwrap();
    let layers: Vec<usize> = model.checkpoint().shape().layers.iter().map(|l| l.layer).collect();
    let candidates = [vec![], vec![0], vec![1], vec![0, 1]];
    let first = probe.layer_errors(layers[0], &candidates).unwrap();
    assert!(first[0] == 0.0 && first[1..].iter().all(|error| *error > 0.0), "{first:?}");
    let second = probe.layer_errors(layers[1], &candidates).unwrap();
    // In any order, and again: the same.
    assert_eq!(probe.layer_errors(layers[0], &candidates).unwrap(), first);
    assert_eq!(probe.layer_errors(layers[1], &candidates).unwrap(), second);
    probe.settle(layers[0], &[0, 1]).unwrap();
    assert_ne!(probe.layer_errors(layers[1], &candidates).unwrap(), second);
    assert_eq!(probe.layer_errors(layers[0], &candidates).unwrap(), first);
    assert!(probe.layer_errors(99, &candidates).unwrap_err().to_string().contains("MoE layers"));
}

#[test]
fn searches_run_on_a_model() {
    let model = open("tf5/mixtral");
    let checkpoint = model.checkpoint().clone();
    let shape = checkpoint.shape();
    let engine = Engine::new(&model, EngineOptions::default());
    let waves = waves(model.config().vocab_size);
    let mut probe = EngineProbe::new(&engine, waves, ProbeOptions::default()).unwrap();
    let scores = magnitude(&checkpoint).to_experts(Reduction::Sum).unwrap();
    let none = ProtectionMask::none();
    let request = PruneRequest::new(&scores, shape, Budget::Ratio(0.3), &none);
    let experts = request.with_limits(Limits::Experts(ExpertLimits::default()));
    // All that fit the budget, by brute force.
    let dropped = {
        let found = Global::default().allocate(&experts).unwrap();
        found.layers.iter().map(|layer| layer.removed.len()).sum::<usize>()
    };
    let bits: usize = shape.layers.iter().map(|layer| layer.num_experts()).sum();
    let mut all: Vec<f64> = Vec::new();
    let mut kept = PrunePlan::keep_all(shape, "").kept;
    for mask in 0u32..1 << bits {
        if mask.count_ones() as usize != dropped {
            continue;
        }
        let mut bit = 0;
        for (kept, layer) in kept.iter_mut().zip(&shape.layers) {
            kept.removed.clear();
            for (expert, width) in layer.widths.iter().enumerate() {
                let gone = mask & (1 << bit) != 0;
                bit += 1;
                kept.experts[expert] = if gone { vec![] } else { (0..*width as u32).collect() };
                if gone {
                    kept.removed.push(expert as u32);
                }
            }
        }
        if kept.iter().all(|layer| layer.experts.len() - layer.removed.len() >= shape.top_k) {
            all.push(probe.distortion(&kept).unwrap().mean);
        }
    }
    all.sort_by(f64::total_cmp);
    let median = all[all.len() / 2];
    let measured = CurveSource::Measured { points: 4, statistic: Statistic::Mean };
    let local = CurveSource::LayerErrors { points: 4, statistic: Statistic::Mean };
    for allocator in [
        AllocatorConfig::Rco(Rco { steps: 40, ..Rco::default() }),
        AllocatorConfig::Evolution(Evolution { population: 6, generations: 3, ..Evolution::default() }),
        AllocatorConfig::RateDistortion(RateDistortion { curves: measured, ..RateDistortion::default() }),
        AllocatorConfig::RateDistortion(RateDistortion { curves: local, ..RateDistortion::default() }),
    ] {
        let pruner = ExpertPruner::with_allocator(allocator.clone());
        let found = pruner.prune_with(&request, &mut probe).unwrap();
        let reached = probe.distortion(&found.plan.kept).unwrap().mean;
        assert_eq!(found.allocation.measured, Some(reached), "{allocator:?}");
        assert!(reached >= all[0] - 1e-9, "{allocator:?}");
        if let AllocatorConfig::Rco(_) = allocator {
            assert!(reached < median, "{reached}, the best has {}, the median {median}", all[0]);
        }
        assert_eq!(pruner.prune_with(&request, &mut probe).unwrap(), found, "{allocator:?}");
    }
    for progressive in [false, true] {
        let subset = SubsetPruner { progressive, ..SubsetPruner::default() };
        let found = subset.prune_with(&request, &mut probe).unwrap();
        assert!(found.plan.kept.iter().all(|layer| layer.removed.len() == found.plan.kept[0].removed.len()));
        assert!(found.allocation.predicted.unwrap() > 0.0);
    }
    // Units, on measured curves, one per layer.
    let units = magnitude(&checkpoint);
    let request = PruneRequest::new(&units, shape, Budget::Ratio(0.5), &none);
    let measured = CurveSource::Measured { points: 3, statistic: Statistic::Worst };
    for within in [Within::Compete, Within::Even] {
        let allocator =
            AllocatorConfig::RateDistortion(RateDistortion { curves: measured.clone(), within, block: None });
        let found = UnitPruner::with_allocator(allocator).prune_with(&request, &mut probe).unwrap();
        assert_eq!(found.allocation.dropped, found.allocation.asked_dropped);
        assert!(found.allocation.measured.is_some_and(|measured| measured > 0.0));
    }
    let limits = Limits::Units(Default::default());
    let curves =
        DistortionCurves::measure(&request.with_limits(limits), Within::Compete, 4, &mut probe, &mut |_, _| ())
            .unwrap();
    assert_eq!(curves.model, checkpoint.fingerprint());
    assert!(curves.curves.iter().all(|curve| curve.points.len() == 5 && curve.points[4].distortion.mean > 0.0));
}
