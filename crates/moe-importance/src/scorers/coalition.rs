//! SHAPE's coalition score.

use moe_checkpoint::{Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{COALITION, ROUTED_TOKENS};

/// The mean Shapley value of an expert in the coalitions that tokens choose: a coalition S of a token's experts is
/// worth `|sum_S o_e|^2 / |m|^2`, with the experts' outputs times their routing weights o and the sum m of all of them.
/// The Shapley value of this game is `<o_e, m> / |m|^2`, since every pair of a token's experts shares twice its inner
/// product evenly; the values of a token's experts add up to 1.
///
/// Values below 0 count as 0, as the published selection covers a part of the *non-negative* mass; `signed` keeps them.
/// With the allocator `normalized` by `coverage` the number of experts per layer follows as published.
///
/// Source: SHAPE, arXiv 2606.09886, which defines Shapley-style values over the top-k coalitions of routing traces.
/// What a coalition is worth is not given in what of it was available; the squared norm is the choice made here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Coalition {
    /// Whether values below 0 stay as they are; default false.
    pub signed: bool,
}

impl Coalition {
    /// With values below 0, or with 0 in their place.
    pub fn new(signed: bool) -> Self {
        Self { signed }
    }
}

impl Scorer for Coalition {
    fn name(&self) -> &str {
        "coalition"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([COALITION, ROUTED_TOKENS]).within(Pool::Layer).additive(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let tokens = divisor(self, statistics.tokens(), "tokens")?;
        expert_table(self, statistics, Average::AllTokens.denominator(), |layer, expert| {
            let value = statistics.expert(COALITION.as_str(), layer)?[expert] / tokens;
            Ok(if self.signed { value } else { value.max(0.0) })
        })
    }
}
