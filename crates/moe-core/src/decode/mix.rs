//! One row of logits from those of several sources.

use std::fmt::Debug;

/// Makes the logits of the next token from those of several sources.
pub trait LogitMix: Debug + Send + Sync {
    /// Number of sources, the model itself included.
    fn sources(&self) -> usize;

    /// The logits `[V]` that the token is chosen by, from those of every source `[V]`, the model's first. A token may
    /// be excluded by minus infinity, but not all.
    fn mix(&self, logits: &[&[f32]]) -> Vec<f32>;
}

/// Logarithms of the softmax of logits.
pub(super) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|z| f64::from(z - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    logits.iter().map(|z| f64::from(*z) - log_sum).collect()
}
