//! Squares of the pre-activations of units.

use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{ExpertTrace, Signals};

use super::Collector;
use crate::Result;
use crate::kernels::unit_sums::{Term, UnitMatrices, unit_sums};
use crate::statistics::{GATE_SQUARE, StatisticId, StatisticSpec, UP_SQUARE};

pub(super) const PROVIDED: &[StatisticId] = &[GATE_SQUARE, UP_SQUARE];

/// [`GATE_SQUARE`] and [`UP_SQUARE`], over the tokens routed to the expert: what a unit is before its gate is applied.
///
/// A trace has the units alone, so that gate and up are computed again: one matrix product per expert.
#[derive(Debug)]
pub struct ChannelSquares {
    statistics: Vec<StatisticSpec>,
}

impl ChannelSquares {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).cloned().map(StatisticSpec::unit_sum);
        Self { statistics: statistics.collect() }
    }
}

impl Collector for ChannelSquares {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::UNITS
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let width = trace.expert_weights.width();
        let both = trace.expert_weights.pre_activations(trace.input); // [n, 2I]
        let matrices = UnitMatrices { units: &both, other: None, gate_up: None };
        let sums = unit_sums(matrices, &[Term::Square]).concat();
        for spec in &self.statistics {
            let half = if spec.id == GATE_SQUARE { 0..width } else { width..2 * width };
            let out = into.unit_mut(spec.id.as_str(), Fold::Sum, trace.layer, trace.expert)?;
            out.iter_mut().zip(&sums[half]).for_each(|(out, sum)| *out += sum);
        }
        Ok(())
    }
}
