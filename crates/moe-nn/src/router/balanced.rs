//! Balance by assignment instead of by a loss.

use burn::config::Config;
use burn::module::{Flag, Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use super::{Router, check_top_k, gate, top_of_rows};
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// Configuration of a [`BalancedRouter`].
#[derive(Config, Debug)]
pub struct BalancedRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 1)]
    pub top_k: usize,
    /// The most iterations of row and column scaling.
    #[config(default = 32)]
    pub iterations: usize,
    /// The mean change of the column factors at which iterations end.
    #[config(default = 1e-4)]
    pub tolerance: f64,
}

/// Sinkhorn routing (S-BASE, arXiv 2202.01169, as in Megatron-LM): in training, experts are chosen by `exp(logits)`
/// scaled so that all rows and all columns have equal sums; in evaluation by the logits. Weights are those of the
/// logits alone: a sigmoid for one expert per token, a softmax over all experts for more.
#[derive(Module, Debug)]
pub struct BalancedRouter {
    /// Hidden to experts.
    pub gate: Linear,
    /// Whether experts are chosen in balance. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    top_k: usize,
    iterations: usize,
    tolerance: f64,
}

impl BalancedRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If a token takes more experts than there are.
    pub fn init(&self, device: &Device) -> BalancedRouter {
        check_top_k(self.top_k, self.num_experts);
        BalancedRouter {
            gate: gate(self.d_model, self.num_experts, false, device),
            training: Param::from_bool(true),
            top_k: self.top_k,
            iterations: self.iterations,
            tolerance: self.tolerance,
        }
    }
}

/// Scales the rows and columns of `exp(logits)`, `[rows, columns]`, until all rows have equal sums and all columns,
/// too.
fn sinkhorn(logits: &[f32], columns: usize, iterations: usize, tolerance: f64) -> Vec<f32> {
    let rows = logits.len() / columns;
    // Row factors undo whatever is subtracted from a row.
    let mut cost: Vec<f64> = logits
        .chunks_exact(columns)
        .flat_map(|row| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().map(move |&value| f64::from(value - largest).exp())
        })
        .collect();
    let (mut by_row, mut by_column) = (vec![1.0; rows], vec![1.0; columns]);
    for _ in 0..iterations {
        for (row, factor) in cost.chunks_exact(columns).zip(&mut by_row) {
            let sum: f64 = row.iter().zip(&by_column).map(|(value, column)| value * column).sum();
            *factor = 1.0 / (rows as f64 * (sum + 1e-30));
        }
        let mut sums = vec![0.0; columns];
        for (row, factor) in cost.chunks_exact(columns).zip(&by_row) {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += factor * value);
        }
        let mut change = 0.0;
        for (column, sum) in by_column.iter_mut().zip(sums) {
            let factor = 1.0 / (columns as f64 * (sum + 1e-30));
            change += (factor - *column).abs() / columns as f64;
            *column = factor;
        }
        if change < tolerance {
            break;
        }
    }
    for (row, factor) in cost.chunks_exact_mut(columns).zip(&by_row) {
        row.iter_mut().zip(&by_column).for_each(|(value, column)| *value *= factor * column);
    }
    cost.into_iter().map(|value| value as f32).collect()
}

impl Router for BalancedRouter {
    fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    fn route(&self, x: Tensor<2>, _context: &RouteContext) -> Routing {
        let training = self.training.val().is_enabled() && x.device().is_autodiff();
        let logits = logits(x, &self.gate);
        let score = if self.top_k == 1 { Score::Sigmoid } else { Score::Softmax };
        let scores = score.of(logits.clone());
        let experts = self.num_experts();
        let mut ranked = host(&logits);
        // In evaluation tokens do not see each other; a causal model may still be trained in balance, as published.
        if training {
            ranked = sinkhorn(&ranked, experts, self.iterations, self.tolerance);
        }
        let assignment = top_of_rows(&ranked, experts, self.top_k);
        let weights = Combine::Raw.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: experts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_makes_rows_and_columns_equal() {
        let logits: Vec<f32> = (0..24).map(|i| ((i * 7) % 11) as f32 / 3.0).collect();
        let scaled = sinkhorn(&logits, 4, 500, 1e-12);
        for row in scaled.chunks_exact(4) {
            assert!((row.iter().sum::<f32>() - 1.0 / 6.0).abs() < 1e-5);
        }
        for column in 0..4 {
            assert!((scaled.iter().skip(column).step_by(4).sum::<f32>() - 0.25).abs() < 1e-5);
        }
    }
}
