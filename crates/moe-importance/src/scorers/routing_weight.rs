//! Routing weights of an expert.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Scorer};
use crate::collectors::{Gate, ROUTED_TOKENS, ROUTING_RENORMALISED, ROUTING_SOFTMAX, ROUTING_WEIGHT};
use crate::{Result, StatisticId};

/// Routing weight of an expert over the tokens routed to it: with [`Average::AllTokens`] it orders as the sum, with
/// [`Average::RoutedTokens`] it is the mean.
///
/// With [`Gate::Renormalised`] and [`Average::AllTokens`] this is DERN's s_e (arXiv 2509.10377, step 1), also there as
/// [`Dern`](super::Dern); with [`Gate::AsApplied`] the soft count of SEER-MoE, also there as [`Seer`](super::Seer).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RoutingWeight {
    /// Which gate; default [`Gate::AsApplied`].
    pub gate: Gate,
    /// Over which tokens the mean is taken; default [`Average::AllTokens`].
    pub denominator: Average,
}

impl RoutingWeight {
    /// With these parameters.
    pub fn new(gate: Gate, denominator: Average) -> Self {
        Self { gate, denominator }
    }

    fn statistic(&self) -> StatisticId {
        match self.gate {
            Gate::AsApplied => ROUTING_WEIGHT,
            Gate::Renormalised => ROUTING_RENORMALISED,
            Gate::Softmax => ROUTING_SOFTMAX,
        }
    }
}

impl Scorer for RoutingWeight {
    fn name(&self) -> &'static str {
        "routing_weight"
    }

    fn recipe(&self) -> String {
        super::config::recipe(*self)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Expert
    }

    fn needs(&self) -> Vec<StatisticId> {
        vec![self.statistic(), ROUTED_TOKENS]
    }

    fn reads_weights(&self) -> bool {
        false
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &self.statistic(), self.denominator)
    }
}
