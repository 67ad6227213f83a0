//! TENP's unit score.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::unit_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer, Weighting};
use crate::statistics::{PROJECTION, PROJECTION_WEIGHTED, ROUTED_TOKENS};
use crate::{Error, Result, StatisticId};

/// `mean_t <c_tj, f_t> / |f_t|`: how far the unit's part `c_tj = u_t[j] w_j` of the expert's output `f_t` points along
/// the whole. A unit that works against the rest scores below 0.
///
/// Source: the unit importance of TENP, arXiv 2606.09885, which takes the mean over routed tokens without routing
/// weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Projection {
    /// Over which tokens the mean is taken; default [`Average::RoutedTokens`].
    pub denominator: Average,
    /// Which power of the routing weight weighs a token: none (default) or the weight.
    pub weighting: Weighting,
}

impl Default for Projection {
    fn default() -> Self {
        Self::new(Average::RoutedTokens, Weighting::None)
    }
}

impl Projection {
    /// With these parameters.
    pub fn new(denominator: Average, weighting: Weighting) -> Self {
        Self { denominator, weighting }
    }

    fn statistic(&self) -> StatisticId {
        if self.weighting == Weighting::None { PROJECTION } else { PROJECTION_WEIGHTED }
    }
}

impl Scorer for Projection {
    fn name(&self) -> &str {
        "projection"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([self.statistic(), ROUTED_TOKENS]).additive(self.denominator.additive())
    }

    fn validate(&self) -> Result<()> {
        match self.weighting {
            Weighting::None | Weighting::Weight => Ok(()),
            Weighting::Square => Err(Error::InvalidField {
                scorer: self.name().into(),
                field: "weighting".into(),
                // f enters once, and one factor of the weight makes it what reaches the layer's output.
                reason: "found `square`, expected `none` or `weight`".into(),
            }),
        }
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        self.validate()?;
        unit_means(self, statistics, &self.statistic(), self.denominator, |mean| mean)
    }
}
