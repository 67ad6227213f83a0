//! HEAPr's unit score.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{check_needs, table};
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{ACTIVATION_SQUARE, GRADIENT_SQUARE, ROUTED_TOKENS};

/// HEAPr's importance of atomic experts: `mean_t(u_t[j]^2) * mean_t((d_t . w_j)^2)` over the tokens t routed to the
/// expert, with unit activations u, the gradient d at the expert's output (routing weight included) and the unit's down
/// column w.
///
/// The published form multiplies the first mean by `w_j^T M w_j` with the `H x H` matrix `M = mean_t d_t d_t^T`. That
/// is the second mean, number for number (`w^T d d^T w = (d . w)^2`), and `d_t . w_j` is the gradient at the unit,
/// which the backward sweep forms anyway: two numbers per unit replace a matrix per expert, and one pass replaces two.
///
/// Gradients are of the summed cross-entropy; the published ones are of the mean over a batch, a constant factor where
/// all sequences are equally long. Published scores of never-routed experts are -1, so that they go before dead units
/// of other experts; here both are 0. Ranked over the whole model, as published.
///
/// Source: arXiv 2509.22299.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Heapr {
    /// Over which tokens: published is [`Average::RoutedTokens`], the default. [`Average::AllTokens`] multiplies that
    /// by the share of tokens routed to the expert, so that it estimates the mean of [`Coupled`](super::Coupled) over
    /// all tokens.
    pub denominator: Average,
}

impl Default for Heapr {
    fn default() -> Self {
        Self::new(Average::RoutedTokens)
    }
}

impl Heapr {
    /// With this denominator.
    pub fn new(denominator: Average) -> Self {
        Self { denominator }
    }
}

impl Scorer for Heapr {
    fn name(&self) -> &str {
        "heapr"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([ACTIVATION_SQUARE, GRADIENT_SQUARE, ROUTED_TOKENS]).additive(self.denominator.additive())
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        check_needs(self, statistics)?;
        let denominator = self.denominator.denominator();
        table(self, statistics, denominator, |layer, expert, _| {
            let routed = Average::RoutedTokens.tokens(self, statistics, layer, expert)?;
            let tokens = self.denominator.tokens(self, statistics, layer, expert)?;
            let activations = statistics.unit(ACTIVATION_SQUARE.as_str(), layer, expert)?;
            let gradients = statistics.unit(GRADIENT_SQUARE.as_str(), layer, expert)?;
            Ok(activations.iter().zip(gradients).map(|(u, du)| (u / routed) * (du / tokens)).collect())
        })
    }
}
