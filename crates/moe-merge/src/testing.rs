//! Small experts for tests.

use moe_checkpoint::ExpertWeights;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Numbers in [-1, 1).
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// An expert of random weights.
pub fn expert(hidden: usize, width: usize, seed: u64) -> ExpertWeights {
    let part = |which: u64| noise(hidden * width, seed * 16 + which);
    ExpertWeights { gate: part(0), up: part(1), down: part(2), width, hidden, ..ExpertWeights::default() }
}

/// The same with biases.
pub fn biased_expert(hidden: usize, width: usize, seed: u64) -> ExpertWeights {
    ExpertWeights {
        gate_bias: Some(noise(width, seed * 16 + 3)),
        up_bias: Some(noise(width, seed * 16 + 4)),
        down_bias: Some(noise(hidden, seed * 16 + 5)),
        ..expert(hidden, width, seed)
    }
}

/// A random order of `0..len`.
pub fn shuffled(len: usize, seed: u64) -> Vec<u32> {
    let keys = noise(len, seed);
    let mut order: Vec<u32> = (0..len as u32).collect();
    order.sort_by(|a, b| keys[*a as usize].total_cmp(&keys[*b as usize]));
    order
}
