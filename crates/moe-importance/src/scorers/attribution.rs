//! MoE-Slimming's expert attribution.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{ATTRIBUTION, ATTRIBUTION_CLIPPED, ATTRIBUTION_SQUARE, ROUTED_TOKENS};
use crate::{Error, Result, StatisticId};

/// How far the local loss is expanded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The gradient, as published.
    #[default]
    First,
    /// Gradient and curvature: the change of the loss itself, which is quadratic.
    Second,
}

/// How much the loss of a layer grows without an expert: `(1/T) sum_t 2 a (1 - a) <m_t, o_t> / (|y_t|^2 + 1e-6)`, with
/// the expert's output times its routing weight o, the sum m of these over the token's experts, and the residual stream
/// y after the layer. The loss is the squared change of the stream when all routed experts count `a` times, relative to
/// the stream; a only scales the scores. The second order adds `a^2 |o_t|^2 / (|y_t|^2 + 1e-6)`.
///
/// An expert whose output opposes that of the others scores below 0: the layer is better without it.
///
/// Source: `A_e` of MoE-Slimming (ICML 2026), with its sign turned, in closed form: see
/// [`collectors::Attribution`](crate::collectors::Attribution). The released code averages batches exponentially; here
/// they are added up, so that their order does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Attribution {
    /// Default [`Order::First`].
    pub order: Order,
    /// Whether coordinates are clipped to the 99% quantile of their sizes over the tokens of a wave; default true, as
    /// published.
    pub clip: bool,
    /// How often the routed experts count, in (0, 1); default 0.9.
    pub alpha: f64,
}

impl Default for Attribution {
    fn default() -> Self {
        Self { order: Order::First, clip: true, alpha: 0.9 }
    }
}

impl Attribution {
    /// Of this order, clipped as published.
    pub fn new(order: Order) -> Self {
        Self { order, ..Self::default() }
    }

    fn statistic(&self) -> StatisticId {
        if self.clip { ATTRIBUTION_CLIPPED } else { ATTRIBUTION }
    }
}

impl Scorer for Attribution {
    fn name(&self) -> &str {
        "attribution"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn validate(&self) -> Result<()> {
        match self.alpha > 0.0 && self.alpha < 1.0 {
            true => Ok(()),
            false => Err(Error::InvalidField {
                scorer: self.name().into(),
                field: "alpha".into(),
                reason: format!("found {}, expected a number between 0 and 1, both excluded", self.alpha),
            }),
        }
    }

    fn needs(&self) -> Needs {
        let first = [self.statistic(), ROUTED_TOKENS];
        let second = (self.order == Order::Second).then_some(ATTRIBUTION_SQUARE);
        let needs = Needs::experts(first.into_iter().chain(second).collect::<Vec<_>>()).within(Pool::Layer);
        match self.order {
            Order::First => needs.additive(Pool::Layer),
            // What two experts give together is not in the curvature of either.
            Order::Second => needs,
        }
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        self.validate()?;
        let (tokens, a) = (divisor(self, statistics.tokens(), "tokens")?, self.alpha);
        expert_table(self, statistics, Denominator::AllTokens, |layer, expert| {
            let along = statistics.expert(self.statistic().as_str(), layer)?[expert];
            let curvature = match self.order {
                Order::First => 0.0,
                Order::Second => statistics.expert(ATTRIBUTION_SQUARE.as_str(), layer)?[expert],
            };
            Ok((2.0 * a * (1.0 - a) * along + a * a * curvature) / tokens)
        })
    }
}
