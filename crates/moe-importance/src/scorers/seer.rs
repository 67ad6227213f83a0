//! SEER-MoE's heavy hitters.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{ROUTED_TOKENS, ROUTING_WEIGHT};
use crate::{Result, StatisticId};

/// What a routed token adds to the count of its expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeerCount {
    /// One per token that chose the expert.
    Hard,
    /// Its routing weight.
    #[default]
    Soft,
}

/// Heavy-hitter counts of SEER-MoE (arXiv 2404.05089), per token.
///
/// The soft count adds the routing weights that the model applies to the tokens it routes to the expert, as the
/// reimplementation in CerebrasResearch/reap does. For probabilities over all experts and all tokens, see
/// [`RouterScore`](super::RouterScore).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Seer {
    /// Hard or soft; default [`SeerCount::Soft`].
    pub count: SeerCount,
}

impl Seer {
    /// With this count.
    pub fn new(count: SeerCount) -> Self {
        Self { count }
    }

    fn statistic(&self) -> StatisticId {
        match self.count {
            SeerCount::Hard => ROUTED_TOKENS,
            SeerCount::Soft => ROUTING_WEIGHT,
        }
    }
}

impl Scorer for Seer {
    fn name(&self) -> &str {
        "seer"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS])
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &self.statistic(), Average::AllTokens)
    }
}
