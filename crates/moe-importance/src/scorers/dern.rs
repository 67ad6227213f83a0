//! DERN's expert importance.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{ROUTED_TOKENS, ROUTING_RENORMALIZED};

/// `s_e = (1/N) sum_t [e in the top-k of t] p_t[e]`, with the routing weights p renormalized over the token's top-k and
/// N all tokens: what DERN drops experts by, and weighs segments with.
///
/// Source: arXiv 2509.10377, step 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Dern {}

impl Dern {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for Dern {
    fn name(&self) -> &str {
        "dern"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([ROUTING_RENORMALIZED, ROUTED_TOKENS])
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_means(self, statistics, &ROUTING_RENORMALIZED, Average::AllTokens)
    }
}
