//! MoE-Slimming's channel score.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{check_needs, table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{ACTIVATION_SQUARE, GATE_SQUARE, ROUTED_TOKENS, UP_SQUARE};

/// `(|u_j| + |up_j| + |gate_j|) / 3`, norms over the tokens routed to the expert of the unit's activation and of its
/// two pre-activations. The norms are not divided by the number of tokens, so that often used experts score higher.
///
/// Comparable within a layer; coverage adds the scores up.
///
/// Source: the `activation` metric of MoE-Slimming (ICML 2026), over the data as a whole instead of an exponential
/// average of batches. Its division by the mean of a layer changes no order within one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ChannelNorms {}

impl ChannelNorms {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for ChannelNorms {
    fn name(&self) -> &str {
        "channel_norms"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([ACTIVATION_SQUARE, GATE_SQUARE, UP_SQUARE, ROUTED_TOKENS])
            .within(Pool::Layer)
            .additive(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        check_needs(self, statistics)?;
        table(self, statistics, Denominator::None, |layer, expert, width| {
            let mut scores = vec![0.0; width];
            for id in [ACTIVATION_SQUARE, UP_SQUARE, GATE_SQUARE] {
                let squares = statistics.unit(id.as_str(), layer, expert)?;
                scores.iter_mut().zip(squares).for_each(|(score, square)| *score += square.sqrt() / 3.0);
            }
            Ok(scores)
        })
    }
}
