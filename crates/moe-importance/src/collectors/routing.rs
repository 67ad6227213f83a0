//! How many tokens each expert gets, and with what weight.

use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{LayerTrace, Signals};

use super::Collector;
use super::gates::LayerGates;
use crate::Result;
use crate::scorers::Gate;
use crate::statistics::{
    ROUTED_TOKENS, ROUTING_GATE, ROUTING_RENORMALIZED, ROUTING_SOFTMAX, ROUTING_WEIGHT, StatisticId, StatisticSpec,
};

pub(super) const PROVIDED: &[StatisticId] =
    &[ROUTED_TOKENS, ROUTING_WEIGHT, ROUTING_GATE, ROUTING_RENORMALIZED, ROUTING_SOFTMAX];

/// [`ROUTED_TOKENS`] and [`ROUTING_WEIGHT`], and [`ROUTING_GATE`], [`ROUTING_RENORMALIZED`] and [`ROUTING_SOFTMAX`] if
/// asked for.
#[derive(Debug)]
pub struct Routing {
    statistics: Vec<StatisticSpec>,
    gate: bool,
    softmax: bool,
    renormalized: bool,
}

impl Routing {
    /// Counts and weights, and those of the others that are among `ids`.
    pub fn new(ids: &[StatisticId]) -> Self {
        let always = [ROUTED_TOKENS, ROUTING_WEIGHT];
        let wanted = PROVIDED.iter().filter(|id| always.contains(id) || ids.contains(id));
        Self {
            statistics: wanted.cloned().map(StatisticSpec::expert_sum).collect(),
            gate: ids.contains(&ROUTING_GATE),
            softmax: ids.contains(&ROUTING_SOFTMAX),
            renormalized: ids.contains(&ROUTING_RENORMALIZED),
        }
    }
}

impl Collector for Routing {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> Result<()> {
        let counts = into.expert_mut(ROUTED_TOKENS.as_str(), Fold::Sum, trace.layer)?;
        for (slot, expert) in trace.selected.iter().enumerate() {
            // A choice that no expert sees is no token of one.
            counts[*expert as usize] += f64::from(u8::from(trace.is_seen(slot)));
        }
        let sums = into.expert_mut(ROUTING_WEIGHT.as_str(), Fold::Sum, trace.layer)?;
        for (expert, weight) in trace.selected.iter().zip(trace.weights) {
            sums[*expert as usize] += f64::from(*weight);
        }
        if self.gate {
            let sums = into.expert_mut(ROUTING_GATE.as_str(), Fold::Sum, trace.layer)?;
            for (expert, weight) in trace.selected.iter().zip(trace.weights) {
                sums[*expert as usize] += f64::from(*weight) / f64::from(trace.scale);
            }
        }
        if self.softmax || self.renormalized {
            let gates = LayerGates::new(trace, self.softmax);
            let others = [
                (self.renormalized, ROUTING_RENORMALIZED, Gate::Renormalized),
                (self.softmax, ROUTING_SOFTMAX, Gate::Softmax),
            ];
            for (_, id, gate) in others.into_iter().filter(|(wanted, ..)| *wanted) {
                for (expert, out) in into.expert_mut(id.as_str(), Fold::Sum, trace.layer)?.iter_mut().enumerate() {
                    *out += gates.rows(gate, expert).iter().copied().map(f64::from).sum::<f64>();
                }
            }
        }
        Ok(())
    }
}
