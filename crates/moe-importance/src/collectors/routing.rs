//! How many tokens each expert gets, and with what weight.

use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{LayerTrace, Signals};

use super::{Collector, StatisticId, StatisticSpec};
use crate::Result;

/// Per expert, the number of tokens routed to it.
pub const ROUTED_TOKENS: StatisticId = StatisticId::new("routing.tokens");
/// Per expert, the sum of the routing weights, as the model applies them, over the tokens routed to it.
pub const ROUTING_WEIGHT: StatisticId = StatisticId::new("routing.weight");

/// [`ROUTED_TOKENS`] and [`ROUTING_WEIGHT`].
#[derive(Debug)]
pub struct Routing {
    statistics: [StatisticSpec; 2],
}

impl Routing {
    /// A collector.
    pub fn new() -> Self {
        Self { statistics: [StatisticSpec::expert_sum(ROUTED_TOKENS), StatisticSpec::expert_sum(ROUTING_WEIGHT)] }
    }
}

impl Default for Routing {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for Routing {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> Result<()> {
        let counts = into.expert_mut(ROUTED_TOKENS.as_str(), Fold::Sum, trace.layer)?;
        for expert in trace.selected {
            counts[*expert as usize] += 1.0;
        }
        let sums = into.expert_mut(ROUTING_WEIGHT.as_str(), Fold::Sum, trace.layer)?;
        for (expert, weight) in trace.selected.iter().zip(trace.weights) {
            sums[*expert as usize] += f64::from(*weight);
        }
        Ok(())
    }
}
