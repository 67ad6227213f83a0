//! Mean activation norm, plain or squared.

use moe_checkpoint::{Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{OUTPUT_NORM, OUTPUT_SQUARE, ROUTED_TOKENS};
use crate::{Result, StatisticId};

/// MAN: `mean_t |f_t|` over the tokens routed to the expert, the gate left out; MSAN: the mean of its square.
///
/// Source: arXiv 2606.15716.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Man {
    /// Square the norms: MSAN; default false.
    pub squared: bool,
}

impl Man {
    /// Of norms, or of their squares.
    pub fn new(squared: bool) -> Self {
        Self { squared }
    }

    fn statistic(&self) -> StatisticId {
        if self.squared { OUTPUT_SQUARE } else { OUTPUT_NORM }
    }
}

impl Scorer for Man {
    fn name(&self) -> &str {
        "man"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS]).within(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &self.statistic(), Average::RoutedTokens)
    }
}
