//! Activation importance.

use moe_checkpoint::{Denominator, Granularity, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::norms::down_column_squares;
use super::table::{check_needs, divisor, table};
use super::weights::expert_of_width;
use super::{ExpertWeightsSource, Scorer, ScorerConfig};
use crate::collectors::{ACTIVATION_MAGNITUDE, ROUTED_TOKENS};
use crate::{Result, StatisticId};

/// Over which tokens activations are averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationDenominator {
    /// All tokens: how much a unit moves the average token, so that units of rarely routed experts score low.
    #[default]
    AllTokens,
    /// The tokens routed to the expert: how much a unit moves a token that gets there. Of a never-routed expert: 0.
    RoutedTokens,
}

/// `mean_t |u_t[j]| * ||down[:,j]||_2`: the mean size of what a unit adds to the expert's output, before the routing
/// weight.
///
/// A baseline of arXiv 2606.05538. Comparable over the whole model in both denominators: residual streams of all layers
/// have one scale here, as in the reference, which compares raw values globally.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Activation {
    /// Over which tokens the mean is taken; default [`ActivationDenominator::AllTokens`].
    pub denominator: ActivationDenominator,
}

impl Activation {
    /// With this denominator.
    pub fn new(denominator: ActivationDenominator) -> Self {
        Self { denominator }
    }
}

impl From<Activation> for ScorerConfig {
    fn from(scorer: Activation) -> Self {
        Self::Activation(scorer)
    }
}

impl Scorer for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn recipe(&self) -> String {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Vec<StatisticId> {
        vec![ACTIVATION_MAGNITUDE, ROUTED_TOKENS]
    }

    fn reads_weights(&self) -> bool {
        true
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        check_needs(self, statistics)?;
        let tokens = divisor(self, statistics.tokens(), "tokens")?;
        let denominator = match self.denominator {
            ActivationDenominator::AllTokens => Denominator::AllTokens,
            ActivationDenominator::RoutedTokens => Denominator::RoutedTokens,
        };
        table(self, statistics, Granularity::Unit, Pool::Global, denominator, |layer, expert, width| {
            let sums = statistics.unit(ACTIVATION_MAGNITUDE.as_str(), layer, expert)?;
            let n = match self.denominator {
                ActivationDenominator::AllTokens => tokens,
                // Sums of a never-routed expert are 0, and so is 0 / 1.
                ActivationDenominator::RoutedTokens => {
                    statistics.expert(ROUTED_TOKENS.as_str(), layer)?[expert].max(1.0)
                }
            };
            let squares = down_column_squares(&expert_of_width(weights, layer, expert, width)?);
            Ok(sums.iter().zip(squares).map(|(sum, square)| sum / n * square.sqrt()).collect())
        })
    }
}
