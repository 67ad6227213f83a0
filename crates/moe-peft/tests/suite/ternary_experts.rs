//! MoTE: ternary experts, trained as they run and packed as they were trained.
#![cfg(feature = "flex")]

use crate::common;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use common::{device, model};
use moe_checkpoint::{Checkpoint, Existing};
use moe_core::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    trace::Nobody,
};
use moe_peft::{Recipe, TrainingRun, fold::FoldPrecision};

fn tiny_moe() -> Model {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(path, &device(), None).unwrap()
}

fn rows() -> Vec<Wave> {
    let ids = |seed: u32| (0..14).map(|i| (i * 137 + seed * 31 + 3) % 2048).collect();
    (0..2).map(|id| Wave { id: u64::from(id), sequences: vec![Sequence::new(ids(id))] }).collect()
}

fn recipe(steps: usize) -> Recipe {
    serde_json::from_value(serde_json::json!({
        "method": {"type": "mote"},
        "train": {"max_steps": steps, "epochs": steps, "schedule": {"peak": 2e-3, "warmup": 0.0}},
    }))
    .unwrap()
}

/// Mean loss of the waves.
fn loss(model: &Model, waves: &[Wave]) -> f64 {
    let options = EngineOptions { loss: true, ..EngineOptions::default() };
    let engine = Engine::new(model, options);
    let reports = waves.iter().map(|wave| engine.run(wave, &mut Nobody).unwrap());
    let (sum, count) = reports.fold((0.0, 0), |(sum, count), r| (sum + r.loss.unwrap(), count + r.loss_tokens));
    sum / count as f64
}

#[test]
fn ternary_experts_are_trained_packed_in_two_bits_and_read_as_they_were_evaluated() {
    let (base, waves) = (tiny_moe(), rows());
    let dir = tempfile::tempdir().unwrap();
    let labels = BTreeMap::new();
    let run = |steps: usize, name: &str| {
        let directory = dir.path().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let run = TrainingRun {
            model: &base,
            waves: &waves,
            labels: &labels,
            directory: &directory,
            save_every: 100,
            resume: false,
            fold: FoldPrecision::Bf16,
        };
        let trained = run.train(&recipe(steps), &mut |_| Ok(())).unwrap();
        let in_memory = loss(&trained.as_written(&base, None).unwrap().unwrap(), &waves);
        let saved = trained.save(&base, &directory, Existing::Refuse).unwrap();
        (trained.cost.losses.clone(), in_memory, Arc::new(Checkpoint::open(saved.model.unwrap()).unwrap()))
    };
    let (losses, in_memory, written) = run(30, "long");
    assert!(losses.last().unwrap().loss < 0.6 * losses[0].loss, "{losses:?}");
    // What is written is what was measured, and what was trained.
    let read = loss(&Model::new(written.clone(), &device(), None).unwrap(), &waves);
    assert_eq!(read, in_memory);
    assert!((read - losses.last().unwrap().loss).abs() < 0.25 * losses[0].loss, "{read} after {losses:?}");
    // Two bits per weight, a BF16 scale per row and 16 bytes of shape per matrix.
    let elements = 3 * 96 * 128u64;
    let scales = 2 * (96 + 96 + 128);
    assert_eq!(written.expert_bytes_on_disk(1).unwrap(), 16 * (elements / 4 + scales + 16 * 3));
    for expert in 0..16 {
        let weights = written.expert(1, expert).unwrap();
        for matrix in [&weights.gate, &weights.up, &weights.down] {
            let scale = matrix.iter().fold(0f32, |most, value| most.max(value.abs()));
            assert!(scale > 0.0 && matrix.iter().all(|value| [-scale, 0.0, scale].contains(value)), "{expert}");
        }
    }
    // Everything that is no routed expert and no router is the base's, bit for bit.
    let frozen = |name: &str| !name.contains(".experts.") && !name.ends_with("mlp.gate.weight");
    let mut compared = 0;
    for info in base.checkpoint().tensors().filter(|info| frozen(&info.name)) {
        assert_eq!(written.bytes(&info.name).unwrap(), base.checkpoint().bytes(&info.name).unwrap(), "{}", info.name);
        compared += usize::from(info.name.contains("shared_expert"));
    }
    assert_eq!(compared, 4 * 4);
    let router = "model.layers.1.mlp.gate.weight";
    assert!(written.bytes(router).unwrap() != base.checkpoint().bytes(router).unwrap());
}

#[test]
fn the_gradient_goes_straight_through_to_latent_weights() {
    // One step of a rate that moves every latent weight, none of them over the edge of its code: the same ternary
    // experts, and another step from the same latent weights changes codes at last.
    let (base, waves) = (tiny_moe(), rows());
    let dir = tempfile::tempdir().unwrap();
    let labels = BTreeMap::new();
    let after = |steps: usize, rate: f64| {
        let directory = dir.path().join(format!("{steps}-{rate}"));
        std::fs::create_dir_all(&directory).unwrap();
        let mut recipe = recipe(steps);
        recipe.train.schedule.peak = rate;
        let run = TrainingRun {
            model: &base,
            waves: &waves,
            labels: &labels,
            directory: &directory,
            save_every: 100,
            resume: false,
            fold: FoldPrecision::Bf16,
        };
        let trained = run.train(&recipe, &mut |_| Ok(())).unwrap();
        let saved = trained.save(&base, &directory, Existing::Refuse).unwrap();
        let written = Checkpoint::open(saved.model.unwrap()).unwrap();
        let signs = |values: &[f32]| values.iter().map(|value| value.total_cmp(&0.0)).collect::<Vec<_>>();
        (0..16).flat_map(|expert| signs(&written.expert(0, expert).unwrap().gate)).collect::<Vec<_>>()
    };
    let untouched = after(1, 1e-9);
    let changed = |codes: &[std::cmp::Ordering]| codes.iter().zip(&untouched).filter(|(a, b)| a != b).count();
    let (few, many) = (changed(&after(2, 1e-4)), changed(&after(12, 1e-3)));
    assert!(many > 10 * few.max(1) && many < untouched.len(), "{few} {many} of {}", untouched.len());
}

#[test]
fn a_model_without_a_shared_expert_is_refused_with_the_way_out() {
    let base = model("qwen3_moe");
    let waves = vec![common::wave(base.config().vocab_size)];
    let dir = tempfile::tempdir().unwrap();
    let labels = BTreeMap::new();
    let run = TrainingRun {
        model: &base,
        waves: &waves,
        labels: &labels,
        directory: dir.path(),
        save_every: 100,
        resume: false,
        fold: FoldPrecision::Bf16,
    };
    let error = run.train(&recipe(1), &mut |_| Ok(())).err().unwrap().to_string();
    assert!(error.contains("shared expert") && error.contains("without_shared"), "{error}");
    let mut allowed = recipe(1);
    allowed.method = serde_json::from_value(serde_json::json!({"type": "mote", "without_shared": true})).unwrap();
    run.train(&allowed, &mut |_| Ok(())).unwrap();
}
