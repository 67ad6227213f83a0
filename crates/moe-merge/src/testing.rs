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

/// Keeps the experts that tokens select, each token's in ascending order. Where a small change moves a token from one
/// expert to another, a loss jumps, and a difference quotient is that jump over the step.
#[cfg(feature = "engine")]
#[derive(Debug, Default, PartialEq)]
pub struct Selected(pub Vec<u32>);

#[cfg(feature = "engine")]
impl moe_core::trace::Observer for Selected {
    fn needs(&self) -> moe_core::trace::Signals {
        moe_core::trace::Signals::ROUTING
    }

    fn layer(&mut self, trace: &moe_core::trace::LayerTrace<'_>) -> moe_core::Result<()> {
        for token in trace.selected.chunks_exact(trace.top_k) {
            let mut token = token.to_vec();
            token.sort_unstable();
            self.0.extend(token);
        }
        Ok(())
    }
}
