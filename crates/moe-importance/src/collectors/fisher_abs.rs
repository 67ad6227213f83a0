//! Mean absolute weight gradient per sequence.

use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, gradients, units};
use crate::Result;
use crate::kernels::weight_gradient::{Entry, ExpertOperands, add_row_sums};
use crate::statistics::{FISHER_ABS, StatisticSpec};

/// The criterion of the released Fisher-MoE code:
///
/// `sum_s (sum_h |G_gate[j,h]| + sum_h |G_up[j,h]| + sum_h |G_down[h,j]|) / 3H`
///
/// with G the gradients of sequence s's loss, the *mean* cross-entropy over its predicted tokens. The absolute value is
/// taken per sequence, before sequences are added. A sequence that routes no token to the expert, or predicts no token,
/// adds 0.
///
/// This is the one criterion here that needs weight gradients. They are formed for one expert and sequence at a time
/// and summed while they are in registers, never stored.
///
/// Source: HectorHHZ/Less-is-MoE, the scoring script behind arXiv 2606.05538.
#[derive(Debug)]
pub struct FisherAbs {
    statistics: [StatisticSpec; 1],
}

impl FisherAbs {
    /// A collector.
    pub fn new() -> Self {
        Self { statistics: [StatisticSpec::unit_sum(FISHER_ABS)] }
    }
}

impl Default for FisherAbs {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for FisherAbs {
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
        let out = into.unit_mut(FISHER_ABS.as_str(), Fold::Sum, trace.layer, trace.expert)?;
        let entries = 3.0 * operands.hidden() as f64;
        let segments: Vec<_> = trace
            .segments
            .iter()
            .filter(|segment| segment.loss_tokens > 0)
            .map(|segment| (segment.rows.clone(), 1.0 / (entries * segment.loss_tokens as f64)))
            .collect();
        add_row_sums(Entry::Magnitude, &operands, &segments, out);
        Ok(())
    }
}
