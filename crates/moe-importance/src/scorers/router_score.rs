//! Router-score importance.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::expert_means_as;
use super::units::{combine_tables, combined_needs, nested};
use super::{Average, Combine, ExpertWeightsSource, Magnitude, Needs, Scorer, ScorerConfig};
use crate::statistics::{ROUTED_TOKENS, ROUTER_PROBABILITY, ROUTING_WEIGHT};
use crate::{Result, StatisticId};

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
    /// A scorer of units; default [`Magnitude`], which needs no data.
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

    fn statistic(&self) -> StatisticId {
        match self.router {
            RouterQuantity::Probability => ROUTER_PROBABILITY,
            RouterQuantity::Weight => ROUTING_WEIGHT,
        }
    }

    fn expert_needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS])
    }

    /// The scores of experts alone, `[experts][1]` per layer.
    ///
    /// # Errors
    /// As [`Scorer::score`].
    pub fn experts(&self, statistics: &Statistics) -> Result<ScoreTable> {
        expert_means_as(self, self.expert_needs(), statistics, &self.statistic(), Average::AllTokens)
    }
}

impl Scorer for RouterScore {
    fn name(&self) -> &str {
        "router_score"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(self.clone())
    }

    fn validate(&self) -> Result<()> {
        nested(self, "unit", &self.unit, Granularity::Unit).map(drop)
    }

    fn needs(&self) -> Needs {
        // A unit scorer that does not build is refused by `validate`, not here.
        let units = self.unit.build().map_or_else(|_| Needs::units([]), |unit| unit.needs());
        combined_needs(self.expert_needs(), units, self.combine)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let units = nested(self, "unit", &self.unit, Granularity::Unit)?;
        let experts = self.experts(statistics)?;
        combine_tables(self, statistics, &experts, &units.score(statistics, weights)?, self.combine)
    }
}
