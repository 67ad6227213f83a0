//! The exact token-wise form of HEAPr's score.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::unit_means;
use super::{Average, ExpertWeightsSource, Scorer};
use crate::collectors::{ROUTED_TOKENS, TAYLOR_SQUARE};
use crate::{Result, StatisticId};

/// `mean_t(u_t[j]^2 (d_t . w_j)^2) = mean_t((u_t[j] du_t[j])^2)`: the mean square of the first-order change of a token's loss
/// when the unit is zeroed. As [`Heapr`](super::Heapr), but activation and gradient of a token stay together, which its
/// product of means drops.
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
    fn name(&self) -> &'static str {
        "coupled"
    }

    fn recipe(&self) -> String {
        super::config::recipe(*self)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Unit
    }

    fn needs(&self) -> Vec<StatisticId> {
        vec![TAYLOR_SQUARE, ROUTED_TOKENS]
    }

    fn reads_weights(&self) -> bool {
        false
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        unit_means(self, statistics, &TAYLOR_SQUARE, self.denominator, |mean| mean)
    }
}
