//! AIMER's data-free score.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_table;
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::Result;

/// `1 - mean|w| / sqrt(mean w^2)` over all entries of the expert's gate, up and down matrices: 0 for weights of one
/// magnitude, towards 1 for heavy tails. Needs no data, and a scaled expert scores the same.
///
/// AIMER prunes the largest ratio first, so that the importance is 1 minus it. Its ratio of an all-zero expert is 0,
/// which would keep it before all others; here such an expert scores 0, least.
///
/// Source: arXiv 2603.18492.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Aimer {}

impl Aimer {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for Aimer {
    fn name(&self) -> &str {
        "aimer"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([]).within(Pool::Layer).weights(true)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_table(self, statistics, Denominator::None, |layer, expert| {
            let weights = weights.expert(layer, expert)?;
            let entries = || [&weights.gate, &weights.up, &weights.down].into_iter().flatten().copied().map(f64::from);
            let n = (weights.gate.len() + weights.up.len() + weights.down.len()) as f64;
            let squares: f64 = entries().map(|w| w * w).sum();
            let magnitudes: f64 = entries().map(f64::abs).sum();
            Ok(if squares == 0.0 { 0.0 } else { 1.0 - magnitudes / (squares * n).sqrt() })
        })
    }
}
