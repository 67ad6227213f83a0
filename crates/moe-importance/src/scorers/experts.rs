//! A scorer of units as a scorer of experts.

use moe_checkpoint::{Granularity, Reduction, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ExpertWeightsSource, Fisher, Needs, Scorer, ScorerConfig};
use crate::{Error, Result};

/// Scores of units reduced to one per expert: what makes any unit criterion an expert criterion. The mean of
/// [`Fisher`] with [`Criterion::Abs`](super::Criterion::Abs), say, is the mean absolute gradient of all expert weights,
/// an expert-drop baseline of arXiv 2606.05538.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Experts {
    /// A scorer of units (one of experts is left as it is); default [`Fisher`].
    pub of: Box<ScorerConfig>,
    /// How the units of an expert become one score; default the sum. As JSON `sum`, `mean`, `max` or `{"top": n}`.
    pub reduction: Reduction,
}

impl Default for Experts {
    fn default() -> Self {
        Self::new(Fisher::default(), Reduction::Sum)
    }
}

impl Experts {
    /// With these parameters.
    pub fn new(of: impl Into<ScorerConfig>, reduction: Reduction) -> Self {
        Self { of: Box::new(of.into()), reduction }
    }
}

impl Scorer for Experts {
    fn name(&self) -> &str {
        "experts"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(self.clone())
    }

    fn validate(&self) -> Result<()> {
        let of = self.of.build()?;
        let needs = of.needs();
        if needs.granularity == Granularity::Unit && self.reduction == Reduction::Sum && needs.additive.is_none() {
            return Err(Error::InvalidField {
                scorer: self.name().into(),
                field: "reduction".into(),
                reason: format!(
                    "found `sum`, expected `mean`, `max` or `top`: scores of `{}` are not additive",
                    of.name()
                ),
            });
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        // Parameters that do not build are refused by `validate`, not here.
        let of = self.of.build().map_or_else(|_| Needs::experts([]), |of| of.needs());
        if of.granularity == Granularity::Expert {
            return of;
        }
        let experts = Needs::experts(of.statistics).within(of.pool).weights(of.weights);
        match of.additive.filter(|_| self.reduction == Reduction::Sum) {
            Some(pool) => experts.additive(pool),
            None => experts,
        }
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let table = self.of.build()?.score(statistics, weights)?.to_experts(self.reduction)?;
        Ok(ScoreTable { scorer: self.recipe().to_string(), ..table })
    }
}
