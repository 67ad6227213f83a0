//! Mean absolute weight gradient per sequence, of single matrices.

use burn::tensor::Tensor;
use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{ExpertGradients, ExpertTrace, Signals};

use super::{Collector, gradients, units};
use crate::Result;
use crate::kernels::weight_gradient::{Entry, ExpertOperands, add_row_sums};
use crate::statistics::{FISHER_ABS_DOWN, FISHER_ABS_GATE, FISHER_ABS_UP, StatisticId, StatisticSpec};

pub(super) const PROVIDED: &[StatisticId] = &[FISHER_ABS_GATE, FISHER_ABS_UP, FISHER_ABS_DOWN];

/// What [`FisherAbs`](super::FisherAbs) adds up, of the gate rows, the up rows or the down columns alone, each divided
/// by H: the baselines "mean absolute gradient of a chosen subset of gate, up and down".
///
/// Source: the expert-drop baselines shipped with HectorHHZ/Less-is-MoE (arXiv 2606.05538).
#[derive(Debug)]
pub struct FisherParts {
    statistics: Vec<StatisticSpec>,
}

impl FisherParts {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).cloned().map(StatisticSpec::unit_sum);
        Self { statistics: statistics.collect() }
    }
}

impl Collector for FisherParts {
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
        let (all, units) = (gradients(trace)?, units(trace)?);
        let hidden = trace.input.dims()[1] as f64;
        let segments: Vec<_> = trace
            .segments
            .iter()
            .filter(|segment| segment.loss_tokens > 0)
            .map(|segment| (segment.rows.clone(), 1.0 / (hidden * segment.loss_tokens as f64)))
            .collect();
        let [rows, width] = units.dims();
        let nothing = Tensor::zeros([rows, width], &units.device());
        for spec in &self.statistics {
            // A gradient of which one factor is zero is zero, so that the sums are those of the other matrices.
            let half = |first: usize| all.gate_up.clone().slice([0..rows, first..first + width]);
            let (gate_up, units) = match &spec.id {
                id if *id == FISHER_ABS_GATE => (Tensor::cat(vec![half(0), nothing.clone()], 1), &nothing),
                id if *id == FISHER_ABS_UP => (Tensor::cat(vec![nothing.clone(), half(width)], 1), &nothing),
                _ => (all.gate_up.zeros_like(), units),
            };
            let part = ExpertGradients { gate_up: &gate_up, ..all };
            let operands = ExpertOperands::new(trace, &part, units);
            let out = into.unit_mut(spec.id.as_str(), Fold::Sum, trace.layer, trace.expert)?;
            add_row_sums(Entry::Magnitude, &operands, &segments, out);
        }
        Ok(())
    }
}
