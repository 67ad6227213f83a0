//! Which routing weight weighs a token.

use serde::{Deserialize, Serialize};

use crate::StatisticId;
use crate::statistics::{
    OUTPUT_APPLIED, OUTPUT_APPLIED_SQUARE, OUTPUT_RENORMALIZED, OUTPUT_RENORMALIZED_SQUARE, OUTPUT_SOFTMAX,
    OUTPUT_SOFTMAX_SQUARE, ROUTING_RENORMALIZED, ROUTING_SOFTMAX, ROUTING_WEIGHT,
};

/// Which gate weighs a routed token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// The routing weight as the model applies it.
    #[default]
    AsApplied,
    /// The routing weight divided by the sum over the token's top-k, whether the model does so or not; without the
    /// scaling factor of models that have one.
    Renormalized,
    /// The softmax of the router's logits over all experts, whatever the model makes of them (top-k, sigmoid, bias).
    Softmax,
}

impl Gate {
    /// The statistic with the sum of this gate over the tokens routed to an expert.
    pub fn sum(self) -> StatisticId {
        match self {
            Self::AsApplied => ROUTING_WEIGHT,
            Self::Renormalized => ROUTING_RENORMALIZED,
            Self::Softmax => ROUTING_SOFTMAX,
        }
    }

    /// The statistic with the sum of this gate, or of its square, times the norm of the expert's output.
    pub(super) fn output_norm(self, square: bool) -> StatisticId {
        match (self, square) {
            (Self::AsApplied, false) => OUTPUT_APPLIED,
            (Self::AsApplied, true) => OUTPUT_APPLIED_SQUARE,
            (Self::Renormalized, false) => OUTPUT_RENORMALIZED,
            (Self::Renormalized, true) => OUTPUT_RENORMALIZED_SQUARE,
            (Self::Softmax, false) => OUTPUT_SOFTMAX,
            (Self::Softmax, true) => OUTPUT_SOFTMAX_SQUARE,
        }
    }
}
