//! Magnitudes of unit activations.

use moe_checkpoint::{Fold, Statistics};
use moe_core::kernels::reduce::add_weighted_column_magnitudes;
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, StatisticId, StatisticSpec, units};
use crate::Result;

/// Per unit, `sum_t |u_t[j]|` over the tokens routed to its expert.
pub const ACTIVATION_MAGNITUDE: StatisticId = StatisticId::new("activation.magnitude");

/// `sum_t |u_t[j]|` over the tokens t routed to the expert, with the unit activations `u_t = act(gate x_t) * (up x_t)`.
#[derive(Debug)]
pub struct Activation {
    statistics: [StatisticSpec; 1],
    ones: Vec<f32>,
}

impl Activation {
    /// A collector.
    pub fn new() -> Self {
        Self { statistics: [StatisticSpec::unit_sum(ACTIVATION_MAGNITUDE)], ones: Vec::new() }
    }
}

impl Default for Activation {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for Activation {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::UNITS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let units = units(trace)?; // [n, I]
        let out = into.unit_mut(ACTIVATION_MAGNITUDE.as_str(), Fold::Sum, trace.layer, trace.expert)?;
        self.ones.resize(trace.rows.len(), 1.0);
        add_weighted_column_magnitudes(units, &self.ones, out);
        Ok(())
    }
}
