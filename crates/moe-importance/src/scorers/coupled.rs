//! The exact token-wise form of HEAPr's score.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::unit_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{ROUTED_TOKENS, TAYLOR_SQUARE};

/// `mean_t(u_t[j]^2 (d_t . w_j)^2) = mean_t((u_t[j] du_t[j])^2)`: the mean square of the first-order change of a
/// token's loss when the unit is zeroed. As [`Heapr`](super::Heapr), but activation and gradient of a token stay
/// together, which its product of means drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Coupled {
    /// Over which tokens the mean is taken; default [`Average::AllTokens`].
    pub denominator: Average,
}

impl Coupled {
    /// With this denominator.
    pub fn new(denominator: Average) -> Self {
        Self { denominator }
    }
}

impl Scorer for Coupled {
    fn name(&self) -> &str {
        "coupled"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([TAYLOR_SQUARE, ROUTED_TOKENS]).additive(self.denominator.additive())
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        unit_means(self, statistics, &TAYLOR_SQUARE, self.denominator, |mean| mean)
    }
}
