//! The same waves on the CPU and on a GPU backend: every kernel's device body, forward and backward, inside whole
//! models. Needs a GPU driver; Mesa's software Vulkan does: `cargo xtask gpu`. `MOE_GPU_DEVICE` names the device,
//! `wgpu` by default.
#![cfg(all(feature = "flex", any(feature = "wgpu", feature = "vulkan", feature = "cuda")))]

use std::{collections::BTreeMap, path::Path};

use burn::tensor::{Device, Tensor};
use moe_core::{
    Engine, EngineOptions, Model, Result,
    data::{Sequence, Wave},
    device::device,
    generate::{GenerateOptions, generate},
    host::HostView,
    kernels::reduce::{add_weighted_column_magnitudes, add_weighted_column_squares, row_square_norms},
    trace::{ExpertTrace, Observer, Signals},
};

/// What the statistics of a sweep are made of, per layer and expert.
#[derive(Default)]
struct Recorder(BTreeMap<(usize, usize), Vec<f64>>);

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Signals { units: true, outputs: true, ..Signals::GRADIENTS }
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        let backward = trace.backward.expect("asked for");
        let width = trace.expert_weights.width();
        let mut sums = vec![0.0; 4 * width];
        let norms = row_square_norms(trace.input);
        add_weighted_column_squares(backward.gate_up, &norms, &mut sums[..2 * width]);
        add_weighted_column_squares(backward.units, &norms, &mut sums[2 * width..3 * width]);
        add_weighted_column_magnitudes(trace.units.expect("asked for"), trace.routing_weights, &mut sums[3 * width..]);
        let total = |x: &Tensor<2>| HostView::new(x).as_slice().iter().map(|v| f64::from(*v)).sum::<f64>();
        sums.push(total(trace.output.expect("asked for")));
        sums.push(total(backward.upstream));
        self.0.insert((trace.layer, trace.expert), sums);
        Ok(())
    }
}

fn run(dir: &Path, device: &Device) -> (Recorder, f64, Vec<Vec<u32>>) {
    let model = Model::open(dir, device, None).unwrap();
    let ids = |n: u32, seed: u32| (0..n).map(|i| (i * 31 + seed * 7) % 96 + 1).collect::<Vec<u32>>();
    let wave = Wave { id: 0, sequences: vec![Sequence::new(ids(13, 1)), Sequence::new(ids(5, 2))] };
    let mut recorder = Recorder::default();
    let engine = Engine::new(&model, EngineOptions { head_tokens: 7, ..Default::default() });
    let loss = engine.run(&wave, &mut recorder).unwrap().loss.unwrap();
    let options = GenerateOptions { max_new_tokens: 3, ..Default::default() };
    let generated = generate(&model, &[ids(6, 3), ids(2, 4)], &options, |_| false).unwrap();
    (recorder, loss, generated)
}

fn gpu() -> Device {
    device(&std::env::var("MOE_GPU_DEVICE").unwrap_or_else(|_| "wgpu".to_owned())).unwrap()
}

fn check(fixture: &str) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity").join(fixture);
    let (host, host_loss, host_tokens) = run(&dir, &Device::flex());
    let (gpu, gpu_loss, gpu_tokens) = run(&dir, &gpu());
    assert!((host_loss - gpu_loss).abs() < 1e-3, "{fixture}: loss {host_loss} and {gpu_loss}");
    assert_eq!(host_tokens, gpu_tokens, "{fixture}: generated tokens");
    assert_eq!(host.0.keys().collect::<Vec<_>>(), gpu.0.keys().collect::<Vec<_>>(), "{fixture}: experts visited");
    for (key, a) in &host.0 {
        let largest = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        for (a, b) in a.iter().zip(&gpu.0[key]) {
            assert!((a - b).abs() <= 1e-3 * largest.max(1e-3), "{fixture} {key:?}: {a} and {b}");
        }
    }
}

#[test]
fn qwen2_moe_on_a_gpu() {
    check("tf5/qwen2_moe");
}

#[test]
fn mixed_dense_and_sparse_layers_on_a_gpu() {
    check("tf5/qwen2_moe_mixed");
}

#[test]
fn sliding_window_on_a_gpu() {
    check("tf5/qwen2_moe_sliding");
}

#[test]
fn qwen3_moe_with_yarn_on_a_gpu() {
    check("tf5/qwen3_moe_yarn");
}

#[test]
fn latent_attention_and_grouped_routing_on_a_gpu() {
    check("tf5/deepseek_v2_group");
    check("tf5/deepseek_v3");
    check("tf5/moonlight");
    check("tf5/deepseek_v2_yarn");
}

#[test]
fn sinks_biases_and_clamped_swiglu_on_a_gpu() {
    check("tf5/gpt_oss");
}

#[test]
fn layer_norm_and_sparsemixer_on_a_gpu() {
    check("tf5/phimoe");
    check("tf5/phimoe_longrope");
}

#[test]
fn gelu_on_a_gpu() {
    check("tf5/qwen3_moe_gelu");
    check("tf5/mixtral_gelu_tanh");
}

#[test]
fn partial_and_interleaved_rotation_on_a_gpu() {
    check("tf5/glm4_moe");
    check("tf5/ernie4_5_moe");
}

#[test]
fn projection_norms_and_multipliers_on_a_gpu() {
    check("tf5/olmoe");
    check("tf5/granitemoe");
}
