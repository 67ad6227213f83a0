//! How often an expert is selected.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Scorer};
use crate::collectors::ROUTED_TOKENS;
use crate::{Result, StatisticId};

/// Share of the tokens routed to an expert. The control that every expert criterion must beat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Frequency {}

impl Frequency {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for Frequency {
    fn name(&self) -> &'static str {
        "frequency"
    }

    fn recipe(&self) -> String {
        super::config::recipe(*self)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Expert
    }

    fn needs(&self) -> Vec<StatisticId> {
        vec![ROUTED_TOKENS]
    }

    fn reads_weights(&self) -> bool {
        false
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &ROUTED_TOKENS, Average::AllTokens)
    }
}
