//! Activation importance.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::norms::down_column_squares;
use super::table::{check_needs, table};
use super::weights::expert_of_width;
use super::{Average, ExpertWeightsSource, Needs, Scorer, Weighting};
use crate::statistics::{ACTIVATION_MAGNITUDE, ACTIVATION_SQUARE_WEIGHTED, ACTIVATION_WEIGHTED, ROUTED_TOKENS};
use crate::{Result, StatisticId};

/// `mean_t |u_t[j]| * ||down[:,j]||_2`: the mean size of what a unit adds to the expert's output; with
/// [`Weighting::Weight`], to the layer's output.
///
/// A baseline of arXiv 2606.05538. Comparable over the whole model in both denominators: residual streams of all layers
/// have one scale here, as in the reference, which compares raw values globally.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Activation {
    /// Over which tokens the mean is taken; default [`Average::AllTokens`].
    pub denominator: Average,
    /// Which power of the routing weight weighs a token; default [`Weighting::None`].
    pub weighting: Weighting,
}

impl Activation {
    /// With these parameters.
    pub fn new(denominator: Average, weighting: Weighting) -> Self {
        Self { denominator, weighting }
    }

    fn statistic(&self) -> StatisticId {
        match self.weighting {
            Weighting::None => ACTIVATION_MAGNITUDE,
            Weighting::Weight => ACTIVATION_WEIGHTED,
            Weighting::Square => ACTIVATION_SQUARE_WEIGHTED,
        }
    }
}

impl Scorer for Activation {
    fn name(&self) -> &str {
        "activation"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([self.statistic(), ROUTED_TOKENS]).additive(self.denominator.additive()).weights(true)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        check_needs(self, statistics)?;
        let (id, denominator) = (self.statistic(), self.denominator.denominator());
        table(self, statistics, denominator, |layer, expert, width| {
            let tokens = self.denominator.tokens(self, statistics, layer, expert)?;
            let sums = statistics.unit(id.as_str(), layer, expert)?;
            let squares = down_column_squares(&expert_of_width(weights, layer, expert, width)?);
            Ok(sums.iter().zip(squares).map(|(sum, square)| sum / tokens * square.sqrt()).collect())
        })
    }
}
