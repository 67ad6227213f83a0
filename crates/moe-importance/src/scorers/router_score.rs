//! Router-score importance.

use moe_checkpoint::{Denominator, Granularity, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::{check_needs, divisor, table};
use super::{ExpertWeightsSource, Magnitude, Scorer, ScorerConfig};
use crate::collectors::{ROUTED_TOKENS, ROUTER_PROBABILITY, ROUTING_WEIGHT};
use crate::{Error, Result, StatisticId};

/// What of the router is averaged, over all tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterQuantity {
    /// Softmax probability over all experts, whether the expert is selected or not: the expert-drop baseline of the
    /// Fisher-MoE release.
    #[default]
    Probability,
    /// Routing weight as the model applies it, 0 where the expert is not selected.
    Weight,
}

/// How an expert's score becomes scores of its units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// The expert's score decides; the unit scorer orders only the units of experts that score the same. Whole experts
    /// go first, whatever their units.
    #[default]
    TieBreak,
    /// The product of both scores.
    Multiply,
}

/// Mean router score of an expert, and a unit scorer below it.
///
/// A baseline of arXiv 2606.05538. Compared over the whole model, as the reference does. The softmax of one layer sums
/// to 1 over its experts, so between layers this compares shares of the traffic, not effects on the output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RouterScore {
    /// What of the router is averaged; default [`RouterQuantity::Probability`].
    pub router: RouterQuantity,
    /// Default [`Combine::TieBreak`].
    pub combine: Combine,
    /// Scorer of units, any but this one; default [`Magnitude`], which needs no data.
    pub unit: Box<ScorerConfig>,
}

impl Default for RouterScore {
    fn default() -> Self {
        Self::new(RouterQuantity::default(), Combine::default(), Magnitude::new())
    }
}

impl RouterScore {
    /// With these parameters.
    pub fn new(router: RouterQuantity, combine: Combine, unit: impl Into<ScorerConfig>) -> Self {
        Self { router, combine, unit: Box::new(unit.into()) }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidField`] if the unit scorer is a router score itself.
    pub fn validate(&self) -> Result<()> {
        match *self.unit {
            ScorerConfig::RouterScore(_) => Err(Error::InvalidField {
                scorer: self.name().into(),
                field: "unit".into(),
                reason: "found scorer `router_score`, expected a scorer of units".into(),
            }),
            _ => Ok(()),
        }
    }

    fn statistic(&self) -> StatisticId {
        match self.router {
            RouterQuantity::Probability => ROUTER_PROBABILITY,
            RouterQuantity::Weight => ROUTING_WEIGHT,
        }
    }

    /// The scores of experts alone, `[experts][1]` per layer.
    ///
    /// # Errors
    /// As [`Scorer::score`].
    pub fn experts(&self, statistics: &Statistics) -> Result<ScoreTable> {
        check_needs(self, statistics)?;
        let tokens = divisor(self, statistics.tokens(), "tokens")?;
        let id = self.statistic();
        table(self, statistics, Granularity::Expert, Pool::Global, Denominator::AllTokens, |layer, expert, _| {
            Ok(vec![statistics.expert(id.as_str(), layer)?[expert] / tokens])
        })
    }
}

impl From<RouterScore> for ScorerConfig {
    fn from(scorer: RouterScore) -> Self {
        Self::RouterScore(scorer)
    }
}

impl Scorer for RouterScore {
    fn name(&self) -> &'static str {
        "router_score"
    }

    fn recipe(&self) -> String {
        super::config::recipe(self.clone())
    }

    fn needs(&self) -> Vec<StatisticId> {
        let mut needs = vec![self.statistic(), ROUTED_TOKENS];
        // A router score below a router score is refused, not followed.
        if self.validate().is_ok() {
            let units = self.unit.build().map(|unit| unit.needs()).unwrap_or_default();
            needs.extend(units.into_iter().filter(|id| *id != ROUTED_TOKENS));
        }
        needs
    }

    fn reads_weights(&self) -> bool {
        self.validate().is_ok() && self.unit.build().is_ok_and(|unit| unit.reads_weights())
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        self.validate()?;
        let experts = self.experts(statistics)?;
        let units = self.unit.build()?.score(statistics, weights)?;
        match self.combine {
            Combine::TieBreak => Ok(ScoreTable::broadcast(&experts, &units)?),
            Combine::Multiply => {
                let value = |table: &ScoreTable, layer: usize, expert: usize| {
                    table.layer(layer).map(|l| l.scores[expert].clone()).unwrap_or_default()
                };
                let pool = experts.pool.min(units.pool);
                table(self, statistics, Granularity::Unit, pool, Denominator::AllTokens, |layer, expert, _| {
                    let router = f64::from(value(&experts, layer, expert)[0]);
                    Ok(value(&units, layer, expert).into_iter().map(|unit| router * f64::from(unit)).collect())
                })
            }
        }
    }
}
