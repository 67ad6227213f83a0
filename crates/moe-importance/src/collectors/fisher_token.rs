//! Squared gradients per token, without weight gradients.

use moe_checkpoint::{Fold, Statistics};
use moe_core::kernels::reduce::{add_weighted_column_squares, row_square_norms};
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, StatisticId, StatisticSpec, gradients, units};
use crate::Result;

/// Per unit, the squared gradients of every token's contribution, summed over tokens: see [`FisherToken`].
pub const FISHER_TOKEN: StatisticId = StatisticId::new("fisher.token");

/// Diagonal empirical Fisher with one sample per token, exact:
///
/// `sum_t (dg_t[j]^2 + dv_t[j]^2) * |x_t|^2 + u_t[j]^2 * |d_t|^2`
///
/// over the tokens t routed to the expert, with input `x_t`, unit activations `u_t`, gradients `dg_t`, `dv_t` at the
/// gate and up pre-activations and `d_t` at the expert's output (routing weight included). The gradient of one token
/// with respect to a weight matrix is an outer product, so its squares are products of squares and no weight gradient
/// is formed. The loss is the summed cross-entropy: every predicted token has weight 1.
///
/// Source: the squared-gradient criterion of "Less is MoE", arXiv 2606.05538, per token.
#[derive(Debug)]
pub struct FisherToken {
    statistics: [StatisticSpec; 1],
    columns: Vec<f64>,
}

impl FisherToken {
    /// A collector.
    pub fn new() -> Self {
        Self { statistics: [StatisticSpec::unit_sum(FISHER_TOKEN)], columns: Vec::new() }
    }
}

impl Default for FisherToken {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for FisherToken {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::GRADIENTS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let (gradients, units) = (gradients(trace)?, units(trace)?);
        let out = into.unit_mut(FISHER_TOKEN.as_str(), Fold::Sum, trace.layer, trace.expert)?;
        let width = out.len();

        self.columns.clear();
        self.columns.resize(2 * width, 0.0);
        add_weighted_column_squares(gradients.gate_up, &row_square_norms(trace.input), &mut self.columns); // [2I]
        let (gate, up) = self.columns.split_at(width);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out += gate + up;
        }

        let mut norms = row_square_norms(gradients.upstream); // [n]
        for (norm, weight) in norms.iter_mut().zip(trace.routing_weights) {
            *norm *= weight * weight;
        }
        add_weighted_column_squares(units, &norms, out); // [I]
        Ok(())
    }
}
