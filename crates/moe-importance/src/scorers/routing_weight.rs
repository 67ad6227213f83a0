//! Routing weights of an expert.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Gate, Needs, Scorer};
use crate::statistics::ROUTED_TOKENS;
use crate::{Result, StatisticId};

/// Routing weight of an expert over the tokens routed to it: with [`Average::AllTokens`] it orders as the sum, with
/// [`Average::RoutedTokens`] it is the mean.
///
/// With [`Gate::Renormalized`] and [`Average::AllTokens`] this is DERN's s_e (arXiv 2509.10377, step 1), also there as
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
        self.gate.sum()
    }
}

impl Scorer for RoutingWeight {
    fn name(&self) -> &str {
        "routing_weight"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS])
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &self.statistic(), self.denominator)
    }
}
