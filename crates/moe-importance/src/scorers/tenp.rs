//! TENP's expert score.

use moe_checkpoint::{Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{OUTPUT_TURN, ROUTED_TOKENS};

/// `sum_t g_t |f_t| (1 - cos(h_t, f_t))` per token: output that turns the hidden state counts, output along it does
/// not.
///
/// The page that describes it does not say which hidden state h is; here it is the expert's input, the normed state
/// that the router reads as well. Its normalization per domain is a factor per layer and domain and changes no order
/// within a layer of one data set; for several domains, score each and add the tables.
///
/// Source: the expert importance of TENP, arXiv 2606.09885.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Tenp {}

impl Tenp {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for Tenp {
    fn name(&self) -> &str {
        "tenp"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([OUTPUT_TURN, ROUTED_TOKENS]).within(Pool::Layer).additive(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &OUTPUT_TURN, Average::AllTokens)
    }
}
