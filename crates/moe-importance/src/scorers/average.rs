//! What sums over routed tokens are divided by.

use moe_checkpoint::{Denominator, Pool, Statistics};
use serde::{Deserialize, Serialize};

use super::Scorer;
use super::table::divisor;
use crate::Result;
use crate::statistics::ROUTED_TOKENS;

/// Over which tokens a sum over routed tokens is averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Average {
    /// All tokens: what the average token sees, so that what is rarely routed to scores low. Orders as the plain sum
    /// does.
    #[default]
    AllTokens,
    /// The tokens routed to the expert: what a token that gets there sees. Of a never-routed expert: 0.
    RoutedTokens,
}

impl Average {
    pub(super) fn denominator(self) -> Denominator {
        match self {
            Self::AllTokens => Denominator::AllTokens,
            Self::RoutedTokens => Denominator::RoutedTokens,
        }
    }

    /// Over which pool such means of amounts may be added: means over other tokens for every expert only within an
    /// expert.
    pub(super) fn additive(self) -> Pool {
        match self {
            Self::AllTokens => Pool::Global,
            Self::RoutedTokens => Pool::Expert,
        }
    }

    /// What sums of `expert` are divided by. Checks that there is data, whatever is divided by.
    pub(super) fn tokens(
        self,
        scorer: &dyn Scorer,
        statistics: &Statistics,
        layer: usize,
        expert: usize,
    ) -> Result<f64> {
        let tokens = divisor(scorer, statistics.tokens(), "tokens")?;
        Ok(match self {
            Self::AllTokens => tokens,
            // Sums of a never-routed expert are 0, and so is 0 / 1.
            Self::RoutedTokens => statistics.expert(ROUTED_TOKENS.as_str(), layer)?[expert].max(1.0),
        })
    }
}

/// Which power of the routing weight, as the model applies it, weighs a token. The unit activations and outputs of an
/// expert do not have it yet, gradients do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// None: every routed token counts the same.
    #[default]
    None,
    /// The routing weight: what reaches the layer's output.
    Weight,
    /// Its square.
    Square,
}
