//! Squares of what experts are given, times their routing weights.

use moe_checkpoint::{ArrayKind, Extent, Fold, Statistics};
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, units};
use crate::Result;
use crate::kernels::unit_sums::{Term, UnitMatrices, unit_sums};
use crate::statistics::{INPUT_SQUARE_WEIGHTED, StatisticId, StatisticSpec, UNIT_SQUARE_WEIGHTED};

pub(super) const PROVIDED: &[StatisticId] = &[INPUT_SQUARE_WEIGHTED, UNIT_SQUARE_WEIGHTED];

/// [`INPUT_SQUARE_WEIGHTED`] and [`UNIT_SQUARE_WEIGHTED`], over the tokens routed to an expert: by how much a weight of
/// its matrices is multiplied.
///
/// Source: MoE-Pruner, arXiv 2410.12013.
#[derive(Debug)]
pub struct WeightedInputs {
    statistics: Vec<StatisticSpec>,
}

impl WeightedInputs {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let spec = |id: &StatisticId| match *id == INPUT_SQUARE_WEIGHTED {
            true => StatisticSpec { id: id.clone(), kind: ArrayKind::Vector(Extent::Hidden), fold: Fold::Sum },
            false => StatisticSpec::unit_sum(id.clone()),
        };
        Self { statistics: PROVIDED.iter().filter(|id| ids.contains(id)).map(spec).collect() }
    }
}

impl Collector for WeightedInputs {
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
        let squares: Vec<f32> = trace.routing_weights.iter().map(|weight| weight * weight).collect();
        for StatisticSpec { id, fold, .. } in &self.statistics {
            let inputs = *id == INPUT_SQUARE_WEIGHTED;
            let matrix = if inputs { trace.input } else { units(trace)? };
            let matrices = UnitMatrices { units: matrix, other: Some(matrix), gate_up: None };
            let sums = unit_sums(matrices, &[Term::Product(&squares)]).concat();
            let out = match inputs {
                true => into.vector_mut(id.as_str(), Extent::Hidden, *fold, trace.layer, trace.expert)?,
                false => into.unit_mut(id.as_str(), *fold, trace.layer, trace.expert)?,
            };
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
        Ok(())
    }
}
