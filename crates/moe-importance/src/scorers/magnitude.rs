//! Magnitude importance.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::norms::{down_column_squares, row_squares};
use super::table::table;
use super::weights::expert_of_width;
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::Result;

/// `sqrt(||gate[j,:]||^2 + ||up[j,:]||^2 + ||down[:,j]||^2)`: the norm of a unit's weights. Needs no data.
///
/// A baseline of arXiv 2606.05538. Comparable over the whole model, as in the reference, which compares raw values
/// globally.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Magnitude {}

impl Magnitude {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for Magnitude {
    fn name(&self) -> &str {
        "magnitude"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([]).additive(Pool::Global).weights(true)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        table(self, statistics, Denominator::None, |layer, expert, width| {
            let weights = expert_of_width(weights, layer, expert, width)?;
            let down = down_column_squares(&weights);
            let rows = row_squares(&weights.gate, weights.hidden).zip(row_squares(&weights.up, weights.hidden));
            Ok(rows.zip(down).map(|((gate, up), down)| (gate + up + down).sqrt()).collect())
        })
    }
}
