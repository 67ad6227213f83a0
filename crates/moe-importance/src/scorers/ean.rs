//! Expert activation norm.

use moe_checkpoint::{Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{OUTPUT_NORM, ROUTED_TOKENS};

/// EAN: norm `|f_t|` of the expert's output, the routing weight left out. [`Average::AllTokens`] orders as the
/// published sum, [`Average::RoutedTokens`] is the published mean, which is [`Man`](super::Man) as well.
///
/// Source: the criteria of the REAP code (arXiv 2510.13999), after arXiv 2504.05586.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Ean {
    /// Sum or mean; default [`Average::AllTokens`], the sum.
    pub denominator: Average,
}

impl Ean {
    /// With this denominator.
    pub fn new(denominator: Average) -> Self {
        Self { denominator }
    }
}

impl Scorer for Ean {
    fn name(&self) -> &str {
        "ean"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([OUTPUT_NORM, ROUTED_TOKENS]).within(Pool::Layer).additive(self.denominator.additive())
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &OUTPUT_NORM, self.denominator)
    }
}
