//! Norm of an expert's weights.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_table;
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::Result;

/// `sqrt(sum w^2)` over all entries of the expert's gate, up and down matrices. Needs no data.
///
/// Source: an expert-drop baseline of arXiv 2606.05538.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ExpertMagnitude {}

impl ExpertMagnitude {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for ExpertMagnitude {
    fn name(&self) -> &str {
        "expert_magnitude"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([]).additive(Pool::Global).weights(true)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        expert_table(self, statistics, Denominator::None, |layer, expert| {
            let weights = weights.expert(layer, expert)?;
            let entries = [&weights.gate, &weights.up, &weights.down].into_iter().flatten().copied().map(f64::from);
            Ok(entries.map(|w| w * w).sum::<f64>().sqrt())
        })
    }
}
