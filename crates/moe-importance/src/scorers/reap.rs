//! REAP's expert score.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::expert_means;
use super::{Average, ExpertWeightsSource, Scorer};
use crate::collectors::{
    Gate, OUTPUT_APPLIED, OUTPUT_APPLIED_SQUARE, OUTPUT_RENORMALISED, OUTPUT_RENORMALISED_SQUARE, OUTPUT_SOFTMAX,
    OUTPUT_SOFTMAX_SQUARE, ROUTED_TOKENS,
};
use crate::{Error, Result, StatisticId};

/// Router-weighted expert activation: `mean_t g_t |f_t|` over the tokens t routed to the expert.
///
/// The published gate is the softmax over all experts, renormalised over the top-k in current versions, with better results.
/// [`Gate::AsApplied`], the default, is what the model multiplies with, which is the renormalised one where the model
/// renormalises. The released REAM code (arXiv 2604.04356) multiplies by the plain softmax twice: [`Gate::Softmax`] with a
/// power of 2. [`Average::AllTokens`] gives the published alternative `sum g |f|`.
///
/// Published as a comparison within layers; raw values are compared over the model if a user asks for that.
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
        match (self.gate, self.power) {
            (Gate::AsApplied, 2) => OUTPUT_APPLIED_SQUARE,
            (Gate::AsApplied, _) => OUTPUT_APPLIED,
            (Gate::Renormalised, 2) => OUTPUT_RENORMALISED_SQUARE,
            (Gate::Renormalised, _) => OUTPUT_RENORMALISED,
            (Gate::Softmax, 2) => OUTPUT_SOFTMAX_SQUARE,
            (Gate::Softmax, _) => OUTPUT_SOFTMAX,
        }
    }
}

impl Scorer for Reap {
    fn name(&self) -> &'static str {
        "reap"
    }

    fn recipe(&self) -> String {
        super::config::recipe(*self)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Expert
    }

    fn needs(&self) -> Vec<StatisticId> {
        vec![self.statistic(), ROUTED_TOKENS]
    }

    fn reads_weights(&self) -> bool {
        false
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
