//! Scores collected on a GPU backend are those collected on the CPU: the device bodies of the collectors' kernels,
//! inside whole models. Needs a GPU driver; Mesa's software Vulkan does: `cargo xtask gpu`. `MOE_GPU_DEVICE` names the
//! device, `wgpu` by default.
#![cfg(all(feature = "flex", any(feature = "wgpu", feature = "vulkan", feature = "cuda")))]

use std::path::Path;

use burn::tensor::Device;
use moe_checkpoint::{Provenance, ScoreTable};
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::scorers::{Activation, Criterion, Fisher, RouterScore};
use moe_importance::{Collection, Scorer, collect};

fn scorers() -> Vec<Box<dyn Scorer>> {
    let fisher = [Criterion::Token, Criterion::Sequence, Criterion::Abs].map(Fisher::new);
    let fisher = fisher.into_iter().map(|fisher| Box::new(fisher) as Box<dyn Scorer>);
    fisher.chain([Box::new(Activation::default()) as _, Box::new(RouterScore::default()) as _]).collect()
}

/// One table per scorer, from two waves of two sequences.
fn tables(dir: &Path, device: &Device) -> Vec<ScoreTable> {
    let model = Model::open(dir, device, None).unwrap();
    let ids = |n: u32, seed: u32| Sequence::new((0..n).map(|i| (i * 31 + seed * 7) % 96 + 1).collect());
    let waves = [(0, [ids(13, 1), ids(5, 2)]), (1, [ids(2, 3), ids(17, 4)])];
    let waves = waves.map(|(id, sequences)| Wave { id, sequences: sequences.into() });
    let provenance = Provenance::new("fixture", "two waves", "{}");
    let mut collection = Collection::for_scorers(model.checkpoint().shape(), provenance, &scorers()).unwrap();
    let mut engine = Engine::new(&model, EngineOptions::default());
    let statistics = collect(&mut engine, &mut collection, &waves, None, &mut |_| {}).unwrap();
    scorers().iter().map(|scorer| scorer.score(&statistics, model.checkpoint().as_ref()).unwrap()).collect()
}

fn check(fixture: &str) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity").join(fixture);
    let gpu = device(&std::env::var("MOE_GPU_DEVICE").unwrap_or_else(|_| "wgpu".to_owned())).unwrap();
    for (host, gpu) in tables(&dir, &Device::flex()).iter().zip(tables(&dir, &gpu)) {
        assert_eq!(host.scorer, gpu.scorer);
        for (host_layer, gpu_layer) in host.layers.iter().zip(&gpu.layers) {
            assert_eq!(host_layer.routed, gpu_layer.routed, "{fixture} {}: routed tokens", host.scorer);
            let largest = host_layer.scores.iter().flatten().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(largest > 0.0, "{fixture} {}: all scores are zero", host.scorer);
            let mut worst = 0.0f32;
            for (a, b) in host_layer.scores.iter().flatten().zip(gpu_layer.scores.iter().flatten()) {
                worst = worst.max((a - b).abs() / largest);
            }
            println!("{fixture} layer {} {}: {worst:.1e} of the largest", host_layer.layer, host.scorer);
            assert!(worst <= 1e-3, "{fixture} layer {} {}: differ by {worst}", host_layer.layer, host.scorer);
        }
    }
}

#[test]
fn scores_of_a_model_with_grouped_attention() {
    check("tf5/qwen2_moe_mixed");
}

#[test]
fn scores_of_biased_experts() {
    check("tf5/gpt_oss");
}

#[test]
fn scores_of_a_model_with_latent_attention() {
    check("tf5/deepseek_v3");
}
