//! Bits as an allocation.
#![cfg(feature = "repair")]

use crate::common;
use crate::run;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::magnitude;
use moe_checkpoint::{BasePrecision, Checkpoint, Existing, Reduction, WeightFormat, WriteOptions, write};
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::{Engine, EngineOptions, Model};
use moe_prune::{
    Budget, Candidate, EngineProbe, ExpertPruner, MixedPrecision, PrecisionGroup, ProbeOptions, ProtectionMask,
    PruneForm, PruneOptions, Pruner, Sensitivities, best_allocation,
};
use run::{logits, logits_of};

fn tiny_moe() -> Arc<Checkpoint> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn model(checkpoint: &Arc<Checkpoint>) -> Model {
    Model::new(checkpoint.clone(), &device("flex").unwrap(), None).unwrap()
}

fn waves(vocabulary: usize) -> Vec<Wave> {
    let ids = |salt: usize| (0..24).map(|i| ((i * 37 + salt * 11 + i * i) % vocabulary) as u32).collect();
    vec![Wave { id: 0, sequences: (0..4).map(|salt| Sequence::new(ids(salt))).collect() }]
}

fn formats(base: &Checkpoint, names: &[&str]) -> Vec<WeightFormat> {
    names.iter().map(|name| name.parse::<BasePrecision>().unwrap().format(base)).collect()
}

#[test]
fn more_bytes_never_diverge_more_and_what_is_predicted_is_about_what_is_measured() {
    let base = tiny_moe();
    let full = model(&base);
    let engine = Engine::new(&full, EngineOptions::default());
    let probe = EngineProbe::new(&engine, waves(2048), ProbeOptions::default()).unwrap();
    let how = MixedPrecision::new(formats(&base, &["int4", "int8"]));
    let found = how.measure(&full, &probe, &mut |_, _| ()).unwrap();
    assert_eq!((found.groups.len(), found.start.mean.abs() < 1e-9), (4, true));
    let four = found.uniform(Some(&how.formats[0])).unwrap();
    let eight = found.uniform(Some(&how.formats[1])).unwrap();
    assert!(four.bytes < eight.bytes && four.predicted > eight.predicted && four.bits > 4.0 && eight.bits < 9.0);
    let mut before = f64::INFINITY;
    for share in 0..=4 {
        let budget = four.bytes + share * (eight.bytes - four.bytes) / 4;
        let allocation = found.allocate(budget).unwrap();
        assert!(allocation.bytes <= budget && allocation.predicted <= before, "{allocation:?}");
        before = allocation.predicted;
        let quantized = allocation.on(&base, None).unwrap();
        assert_eq!(quantized.model().bytes_on_disk(), allocation.bytes, "bytes are those of the files");
        let measured = probe.distortion_of(&model(quantized.model())).unwrap().mean;
        let (low, high) = (0.4 * allocation.predicted, 2.5 * allocation.predicted);
        assert!(measured > low && measured < high, "{measured} for {}", allocation.predicted);
    }
    assert_eq!(found.allocate(four.bytes).unwrap().formats, four.formats);
    assert_eq!(found.allocate(u64::MAX / 2).unwrap().formats, eight.formats);
    let refused = found.allocate(four.bytes - 1).unwrap_err().to_string();
    assert!(refused.contains("keep_bytes") && refused.contains(&four.bytes.to_string()), "{refused}");
}

#[test]
fn experts_of_one_layer_in_several_formats_are_written_and_run_as_in_memory() {
    let base = tiny_moe();
    let full = model(&base);
    let engine = Engine::new(&full, EngineOptions::default());
    let probe = EngineProbe::new(&engine, waves(2048), ProbeOptions::default()).unwrap();
    let how = MixedPrecision {
        within: PrecisionGroup::Expert,
        unquantized: true,
        ..MixedPrecision::new(formats(&base, &["int4"]))
    };
    let found = how.measure(&full, &probe, &mut |_, _| ()).unwrap();
    assert_eq!(found.groups.len(), 64);
    let (small, all) = (found.uniform(Some(&how.formats[0])).unwrap(), found.uniform(None).unwrap());
    assert_eq!(all.predicted, found.start.mean);
    let allocation = found.allocate((small.bytes + all.bytes) / 2).unwrap();
    // As a file they say the same.
    let read: Sensitivities = serde_json::from_str(&serde_json::to_string(&found).unwrap()).unwrap();
    assert_eq!(read.allocate((small.bytes + all.bytes) / 2).unwrap().formats, allocation.formats);
    let kept = allocation.formats.groups().iter().filter(|group| group.format.is_none()).count();
    assert!((10..54).contains(&kept), "{kept} of 64 stay");
    // The experts that stay are those whose rounding hurts: dropping any of them for another of less harm is no better.
    let harm = |stays: bool| {
        let groups = found.groups.iter().zip(allocation.formats.groups());
        groups
            .filter(move |(_, group)| group.format.is_none() == stays)
            .map(|(options, _)| options.options[1].distortion)
            .sum::<f64>()
    };
    assert!(harm(true) / kept as f64 > harm(false) / (64 - kept) as f64);
    let dir = tempfile::tempdir().unwrap();
    let quantized = allocation.on(&base, None).unwrap();
    let out = dir.path().join("mixed");
    write(quantized.model(), &out, &WriteOptions { existing: Existing::Refuse, ..WriteOptions::default() }).unwrap();
    assert_eq!(logits(&out), logits_of(&model(quantized.model())));
    assert_eq!(Checkpoint::open(&out).unwrap().bytes_on_disk(), allocation.bytes);
}

#[test]
fn fewer_experts_with_more_bits_compete_with_all_of_them_with_few() {
    let base = tiny_moe();
    let full = model(&base);
    let engine = Engine::new(&full, EngineOptions::default());
    let probe = EngineProbe::new(&engine, waves(2048), ProbeOptions::default()).unwrap();
    let scores = magnitude(&base).to_experts(Reduction::Sum).unwrap();
    let plan = ExpertPruner::new().prune(&scores, base.shape(), Budget::Ratio(0.25), &ProtectionMask::none()).unwrap();
    let pruned = plan.plan.on(&base, &PruneOptions::new(PruneForm::Uniform)).unwrap().model().clone();
    let how = MixedPrecision::new(formats(&base, &["int4", "int6", "int8"]));
    let of: Vec<Sensitivities> =
        [&base, &pruned].map(|of| how.measure(&model(of), &probe, &mut |_, _| ()).unwrap()).into();
    assert!(of[1].start.mean > of[0].start.mean);
    let four = of[0].uniform(Some(&how.formats[0])).unwrap();
    let (_, best) = best_allocation(&of, four.bytes).unwrap();
    assert!(best.predicted <= four.predicted && best.bytes <= four.bytes);
    // Below what four bits of all experts take, the pruned one alone is small enough.
    let (index, smaller) = best_allocation(&of, four.bytes - 1).unwrap();
    assert_eq!(index, 1);
    assert!(smaller.bytes < four.bytes);
    assert!(best_allocation(&of, 1).is_none());
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/quantized").join(name)
}

#[test]
fn a_budget_in_bytes_counts_quantized_experts_as_they_are_stored() {
    for name in ["ct-int8-g32-w8a16-qwen3_moe", "mxfp4-gpt_oss", "fp8-tensor-static-qwen3_moe"] {
        let base = Arc::new(Checkpoint::open(fixture(name)).unwrap());
        let experts: u64 = base.shape().layers.iter().map(|l| base.expert_bytes_on_disk(l.layer).unwrap()).sum();
        let count: usize = base.shape().layers.iter().map(|layer| layer.num_experts()).sum();
        let asked = base.bytes_on_disk() - experts / 3;
        let budget = Budget::KeepBytes(asked).resolve(&base).unwrap();
        let scores = magnitude(&base).to_experts(Reduction::Sum).unwrap();
        let pruner = ExpertPruner::new().for_routing(&base.config().routing);
        let plan = pruner.prune(&scores, base.shape(), budget, &ProtectionMask::none()).unwrap().plan;
        let pruned = plan.on(&base, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        let bytes = pruned.model().bytes_on_disk();
        // An expert of every layer at most is more than was asked for; a router's rows go with it.
        let spare = base.shape().layers.len() as u64 * (experts / count as u64 + 1024) + 1024;
        assert!(bytes <= asked && bytes + spare >= asked, "{name}: {bytes} of {asked}");
        assert!(Budget::KeepBytes(base.bytes_on_disk()).resolve(&base).is_err(), "{name}: it has no more");
    }
}

#[test]
fn layers_experts_and_bits_compete_in_one_budget_of_bytes() {
    let base = tiny_moe();
    let full = model(&base);
    let waves = waves(2048);
    let engine = Engine::new(&full, EngineOptions::default());
    let probe = EngineProbe::new(&engine, waves.clone(), ProbeOptions::default()).unwrap();
    let candidates: Vec<Candidate> = [
        r#"{"type": "whole"}"#,
        r#"{"type": "pruned", "pruner": {"type": "expert"}, "ratio": 0.5}"#,
        r#"{"type": "layers", "choice": {"type": "influence", "layers": 1}}"#,
        r#"{"type": "layers", "choice": {"type": "list", "layers": [0, 2, 3]}}"#,
    ]
    .iter()
    .map(|json| serde_json::from_str(json).unwrap())
    .collect();
    let names: Vec<String> = candidates.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["all layers and experts", "50% pruned by `expert`", "1 layer less", "3 layers less"]);
    let scores = magnitude(&base).to_experts(Reduction::Sum).unwrap();
    let how = MixedPrecision::new(formats(&base, &["int4", "int8"]));
    let mut found = Vec::new();
    for candidate in &candidates {
        let made = candidate.on(&full, Some(&scores), &waves).unwrap();
        assert_eq!(made.config().layers.len(), [4, 4, 3, 1][found.len()]);
        found.push(how.measure(&model(&made), &probe, &mut |_, _| ()).unwrap());
    }
    assert!(candidates[1].on(&full, None, &waves).unwrap_err().to_string().contains("scores"));
    let least = |found: &Sensitivities| found.uniform(Some(&how.formats[0])).unwrap().bytes;
    let most = |found: &Sensitivities| found.uniform(Some(&how.formats[1])).unwrap().bytes;
    // all bytes: nothing goes; fewer than all experts take in the smallest format: something else does
    assert_eq!(best_allocation(&found, most(&found[0])).unwrap().0, 0);
    let (chosen, allocation) = best_allocation(&found, least(&found[0]) - 1).unwrap();
    assert!(chosen > 0 && allocation.bytes < least(&found[0]), "{chosen}");
    let predicted = |of: &Sensitivities| of.allocate(least(&found[0]) - 1).map_or(f64::INFINITY, |a| a.predicted);
    assert!(found.iter().all(|of| predicted(of) >= allocation.predicted));
    // so small that only a model of one layer is left
    let (chosen, allocation) = best_allocation(&found, least(&found[3])).unwrap();
    assert_eq!(chosen, 3);
    let made = candidates[3].on(&full, None, &waves).unwrap();
    assert_eq!(allocation.on(&made, None).unwrap().model().bytes_on_disk(), allocation.bytes);
    assert!(best_allocation(&found, least(&found[3]) - 1).is_none());
}
