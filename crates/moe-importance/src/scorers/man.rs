//! Mean activation norm, plain or squared.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Scorer};
use crate::collectors::{OUTPUT_NORM, OUTPUT_SQUARE, ROUTED_TOKENS};
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
    fn name(&self) -> &'static str {
        "man"
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
        expert_means(self, statistics, &self.statistic(), Average::RoutedTokens)
    }
}
