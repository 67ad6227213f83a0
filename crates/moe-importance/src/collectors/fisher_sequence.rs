//! Squared weight gradients per sequence.

use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, gradients, units};
use crate::Result;
use crate::kernels::gram::{self, add_gram_sums};
use crate::kernels::weight_gradient::{Entry, ExpertOperands, add_row_sums};
use crate::statistics::{FISHER_SEQUENCE, StatisticSpec};

/// Diagonal empirical Fisher with one sample per sequence:
///
/// `sum_s (sum_h G_gate[j,h]^2 + sum_h G_up[j,h]^2 + sum_h G_down[h,j]^2)`
///
/// with G the gradients of sequence s's loss, the *mean* cross-entropy over its predicted tokens. Squares are taken per
/// sequence, before sequences are added. A sequence that routes no token to the expert, or predicts no token, adds 0.
///
/// For the m tokens of a sequence routed to the expert, `sum_h G_gate[j,h]^2 = sum_{t,t'} dg_t[j] dg_t'[j] (x_t .
/// x_t')`, and likewise for up and down: two m × m Gram matrices instead of weight gradients. Where m is so large that
/// the gradients themselves cost fewer multiplications, they are formed, and summed without being stored.
///
/// Source: the squared-gradient criterion of "Less is MoE", arXiv 2606.05538, per sequence.
#[derive(Debug)]
pub struct FisherSequence {
    statistics: [StatisticSpec; 1],
}

impl FisherSequence {
    /// A collector.
    pub fn new() -> Self {
        Self { statistics: [StatisticSpec::unit_sum(FISHER_SEQUENCE)] }
    }
}

impl Default for FisherSequence {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for FisherSequence {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::GRADIENTS
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let operands = ExpertOperands::new(trace, &gradients(trace)?, units(trace)?);
        let out = into.unit_mut(FISHER_SEQUENCE.as_str(), Fold::Sum, trace.layer, trace.expert)?;
        let (long, short): (Vec<_>, Vec<_>) = trace
            .segments
            .iter()
            .filter(|segment| segment.loss_tokens > 0)
            .map(|segment| (segment.rows.clone(), 1.0 / (segment.loss_tokens as f64).powi(2)))
            .partition(|(rows, _)| gram::costs_more(rows.len(), operands.hidden(), operands.width()));
        add_gram_sums(&operands, &short, out);
        add_row_sums(Entry::Square, &operands, &long, out);
        Ok(())
    }
}
