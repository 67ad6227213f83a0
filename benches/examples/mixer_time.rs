//! Time and memory per token of one linear-attention layer of random weights, forward and backward: gated DeltaNet in
//! the shape of Qwen3.5-35B-A3B, Kimi delta attention in that of Kimi-Linear-48B-A3B and Mamba2 in that of
//! Nemotron-3-Nano, over texts of 512 and 8,192 tokens (or of as many as are given): `cargo run --release --example
//! mixer_time -- [TOKENS ...]`. Memory is what a pass holds at its most beyond what was there before.

use std::time::Instant;

use burn::tensor::{Device, Tensor};
use moe_core::adapters::Wanted;
use moe_core::device::device;
use moe_core::host;
use moe_core::kernels::delta::{DecayPer, DeltaShape};
use moe_core::kernels::ssd::SsdShape;
use moe_core::kernels::weight::Weight;
use moe_core::layers::{
    ApartProjections, DeltaLayer, DeltaProjections, GateActivation, Handover, Linear, MambaLayer, MixerLayer, Norm,
    WideProjection,
};
use moe_core::memory::{process_memory, reset_peak};

/// Passes that are timed; the fastest counts.
const PASSES: usize = 3;
/// Taps of the convolutions.
const KERNEL: usize = 4;

/// Numbers between -1 and 1 without a pattern.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let next = |i: usize| {
        let mut x = (i as u32).wrapping_mul(0x9E37_79B9) ^ seed.wrapping_mul(0x85EB_CA6B);
        x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
        ((x ^ (x >> 12)) >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

fn matrix(rows: usize, columns: usize, seed: u32, device: &Device) -> Tensor<2> {
    let size = (columns as f32).powf(-0.5);
    let values = numbers(rows * columns, seed).into_iter().map(|x| x * size).collect();
    host::from_vec(values, [rows, columns], device)
}

fn linear(rows: usize, columns: usize, seed: u32, device: &Device) -> Linear {
    Linear::new(Weight::dense(matrix(rows, columns, seed, device)), None)
}

fn norm(len: usize, device: &Device) -> Norm {
    Norm::new(host::from_vec(vec![1.0; len], [len], device), None, 1e-6)
}

fn delta_net(hidden: usize, device: &Device) -> MixerLayer {
    let shape = DeltaShape { key_heads: 16, value_heads: 32, key_dim: 128, value_dim: 128, decay: DecayPer::Head };
    let (keys, values) = (shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim);
    let channels = 2 * keys + values;
    MixerLayer::Delta(Box::new(DeltaLayer {
        norm: norm(hidden, device),
        inputs: DeltaProjections::Separate(Box::new([
            linear(channels, hidden, 1, device),
            linear(values, hidden, 2, device),
            linear(shape.value_heads, hidden, 3, device),
            linear(shape.value_heads, hidden, 4, device),
        ])),
        taps: numbers(KERNEL * channels, 5).into(),
        rate: vec![0.5; shape.value_heads].into(),
        rate_bias: numbers(shape.value_heads, 6).into(),
        lower_bound: None,
        gate: GateActivation::Silu,
        output_norm: norm(shape.value_dim, device),
        output: linear(hidden, values, 7, device),
        shape,
    }))
}

fn channel_delta(hidden: usize, device: &Device) -> MixerLayer {
    let (heads, decay) = (32, DecayPer::Channel);
    let shape = DeltaShape { key_heads: heads, value_heads: heads, key_dim: 128, value_dim: 128, decay };
    let width = heads * shape.value_dim;
    let low_rank = |seed| {
        let (down, up) = (linear(128, hidden, seed, device), linear(width, 128, seed + 1, device));
        WideProjection::LowRank(Box::new([down, up]))
    };
    MixerLayer::Delta(Box::new(DeltaLayer {
        norm: norm(hidden, device),
        inputs: DeltaProjections::Apart(Box::new(ApartProjections {
            qkv: [1, 2, 3].map(|seed| linear(width, hidden, seed, device)),
            gate: low_rank(9),
            beta: linear(heads, hidden, 8, device),
            decay: low_rank(5),
        })),
        taps: numbers(KERNEL * 3 * width, 4).into(),
        rate: vec![0.5; heads].into(),
        rate_bias: numbers(width, 7).into(),
        lower_bound: None,
        gate: GateActivation::Sigmoid,
        output_norm: norm(shape.value_dim, device),
        output: linear(hidden, width, 11, device),
        shape,
    }))
}

fn mamba(hidden: usize, device: &Device) -> MixerLayer {
    let shape = SsdShape { heads: 64, head_dim: 64, groups: 8, state: 128 };
    let [values, narrow] = shape.widths();
    let channels = values + 2 * narrow;
    MixerLayer::Mamba(Box::new(MambaLayer {
        norm: norm(hidden, device),
        input: linear(values + channels + shape.heads, hidden, 1, device),
        taps: numbers(KERNEL * channels, 2).into(),
        convolution_bias: Some(numbers(channels, 3).into()),
        rates: vec![-0.5; shape.heads].into(),
        step_bias: numbers(shape.heads, 4).into(),
        least_step: 0.001,
        skip: numbers(shape.heads, 5).into(),
        output_norm: vec![1.0; values].into(),
        eps: 1e-5,
        output: linear(hidden, values, 6, device),
        shape,
        residual: 1.0,
    }))
}

/// Seconds of the fastest pass, and bytes that a pass held at its most beyond what was there before, where the system
/// tells.
fn measured(mut pass: impl FnMut()) -> (f64, Option<u64>) {
    let before = process_memory().map(|memory| memory.resident);
    let counted = reset_peak();
    let mut fastest = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass();
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    let peak = process_memory().map(|memory| memory.peak);
    (fastest, before.zip(peak).filter(|_| counted).map(|(before, peak)| peak.saturating_sub(before)))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let lengths = std::env::args().skip(1).map(|word| word.parse()).collect::<Result<Vec<usize>, _>>()?;
    let lengths = if lengths.is_empty() { vec![512, 8192] } else { lengths };
    let device = device("flex")?;
    let table = moe_core::kernels::rope::RotaryEmbedding::new(
        &moe_checkpoint::RopeConfig {
            theta: 10_000.0,
            interleaved: false,
            scaling: moe_checkpoint::RopeScaling::Default,
        },
        2,
    )?
    .table(&[]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{threads} threads");
    println!("{:<29} {:>7} {:<9} {:>12} {:>14} {:>10}", "layer", "tokens", "pass", "us / token", "KiB / token", "MiB");
    for (name, hidden, layer) in [
        ("gated DeltaNet, H 2048", 2048, delta_net(2048, &device)),
        ("Kimi delta attention, H 2304", 2304, channel_delta(2304, &device)),
        ("Mamba2, H 2688", 2688, mamba(2688, &device)),
    ] {
        for &tokens in &lengths {
            let (x, dy) = (matrix(tokens, hidden, 20, &device), matrix(tokens, hidden, 21, &device));
            let sequences = vec![0..tokens; 1];
            let print = |pass: &str, (seconds, bytes): (f64, Option<u64>)| {
                let [kib, mib] = match bytes {
                    Some(bytes) => [
                        format!("{:.1}", bytes as f64 / 1024.0 / tokens as f64),
                        format!("{:.0}", bytes as f64 / (1 << 20) as f64),
                    ],
                    None => ["-".into(), "-".into()],
                };
                let time = 1e6 * seconds / tokens as f64;
                println!("{name:<29} {tokens:>7} {pass:<9} {time:>12.1} {kib:>14} {mib:>10}");
            };
            let handover = Handover::default();
            let project = || layer.project(&x, &table, &sequences, &handover).expect("no layer chooses keys for it");
            print("forward", measured(|| drop(layer.mix(&x, &project(), &sequences))));
            let wanted = Wanted { input: true, parameters: false };
            let backward = || {
                let tape = project();
                drop(layer.backward(&x, &tape, &sequences, &table, dy.clone(), &handover, wanted));
            };
            print("backward", measured(backward));
        }
    }
    Ok(())
}
