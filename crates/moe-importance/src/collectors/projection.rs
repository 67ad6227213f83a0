//! How far a unit's part of the expert's output points along the whole.

use moe_checkpoint::{Fold, Statistics};
use moe_core::kernels::reduce::row_square_norms;
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, outputs, units};
use crate::Result;
use crate::kernels::unit_sums::{Term, UnitMatrices, unit_sums};
use crate::statistics::{PROJECTION, PROJECTION_WEIGHTED, StatisticId, StatisticSpec};

pub(super) const PROVIDED: &[StatisticId] = &[PROJECTION, PROJECTION_WEIGHTED];

/// [`PROJECTION`] and [`PROJECTION_WEIGHTED`], over the tokens t routed to the expert: unit j adds `c_tj = u_t[j] w_j`
/// to the expert's output `f_t`, and `<c_tj, f_t> / |f_t|` is the length of its shadow on it. A zero output has no
/// shadow and adds 0.
///
/// `<w_j, f_t>` for all units is one matrix product with the down projection, as much work as the output itself.
///
/// Source: the unit importance of TENP, arXiv 2606.09885.
#[derive(Debug)]
pub struct Projection {
    statistics: Vec<StatisticSpec>,
}

impl Projection {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).cloned().map(StatisticSpec::unit_sum);
        Self { statistics: statistics.collect() }
    }
}

impl Collector for Projection {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::UNITS | Signals::OUTPUTS
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let (units, outputs) = (units(trace)?, outputs(trace)?);
        let along = trace.expert_weights.down.backward(outputs); // [n, I]: <w_j, f_t>
        let inverse: Vec<f32> = row_square_norms(outputs)
            .into_iter()
            .map(|square| if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 })
            .collect();
        let weighted: Vec<f32> = inverse.iter().zip(trace.routing_weights).map(|(i, weight)| i * weight).collect();
        let terms: Vec<_> = self
            .statistics
            .iter()
            .map(|spec| Term::Product(if spec.id == PROJECTION { &inverse } else { &weighted }))
            .collect();
        let matrices = UnitMatrices { units, other: Some(&along), gate_up: None };
        for (spec, sums) in self.statistics.iter().zip(unit_sums(matrices, &terms)) {
            let out = into.unit_mut(spec.id.as_str(), Fold::Sum, trace.layer, trace.expert)?;
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
        Ok(())
    }
}
