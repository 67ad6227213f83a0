//! REAP's expert score.

use moe_checkpoint::{Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Gate, Needs, Scorer};
use crate::statistics::ROUTED_TOKENS;
use crate::{Error, Result, StatisticId};

/// Router-weighted expert activation: `mean_t g_t |f_t|` over the tokens t routed to the expert.
///
/// The published gate is the softmax over all experts, renormalized over the top-k in current versions, with better
/// results. [`Gate::AsApplied`], the default, is what the model multiplies with, which is the renormalized one where
/// the model renormalizes. The released REAM code (arXiv 2604.04356) multiplies by the plain softmax twice:
/// [`Gate::Softmax`] with a power of 2. [`Average::AllTokens`] gives the published alternative `sum g |f|`.
///
/// Published as a comparison within layers, and the table says so: norms of outputs grow with the depth of a layer.
///
/// Source: arXiv 2510.13999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Reap {
    /// Which gate; default [`Gate::AsApplied`].
    pub gate: Gate,
    /// Power of the gate, 1 (default) or 2.
    pub power: u8,
    /// Over which tokens the mean is taken; default [`Average::RoutedTokens`].
    pub denominator: Average,
}

impl Default for Reap {
    fn default() -> Self {
        Self::new(Gate::AsApplied, 1, Average::RoutedTokens)
    }
}

impl Reap {
    /// With these parameters; [`Scorer::validate`] checks the power.
    pub fn new(gate: Gate, power: u8, denominator: Average) -> Self {
        Self { gate, power, denominator }
    }

    fn statistic(&self) -> StatisticId {
        self.gate.output_norm(self.power == 2)
    }
}

impl Scorer for Reap {
    fn name(&self) -> &str {
        "reap"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS]).within(Pool::Layer).additive(self.denominator.additive())
    }

    fn validate(&self) -> Result<()> {
        match self.power {
            1 | 2 => Ok(()),
            power => Err(Error::InvalidField {
                scorer: self.name().into(),
                field: "power".into(),
                reason: format!("found {power}, expected 1 or 2"),
            }),
        }
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        self.validate()?;
        expert_means(self, statistics, &self.statistic(), self.denominator)
    }
}
