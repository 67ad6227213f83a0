//! A scorer of units as a scorer of experts.

use moe_checkpoint::{Granularity, Reduction, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::{ExpertWeightsSource, Fisher, Scorer, ScorerConfig};
use crate::{Result, StatisticId};

/// Scores of units reduced to one per expert: what makes any unit criterion an expert criterion. The mean of
/// [`Fisher`] with [`Criterion::Abs`](super::Criterion::Abs), say, is the mean absolute gradient of all expert weights, an
/// expert-drop baseline of arXiv 2606.05538.
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
    fn name(&self) -> &'static str {
        "experts"
    }

    fn recipe(&self) -> String {
        super::config::recipe(self.clone())
    }

    fn granularity(&self) -> Granularity {
        Granularity::Expert
    }

    fn validate(&self) -> Result<()> {
        self.of.build().map(drop)
    }

    fn needs(&self) -> Vec<StatisticId> {
        self.of.build().map(|scorer| scorer.needs()).unwrap_or_default()
    }

    fn reads_weights(&self) -> bool {
        self.of.build().is_ok_and(|scorer| scorer.reads_weights())
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let table = self.of.build()?.score(statistics, weights)?.to_experts(self.reduction)?;
        Ok(ScoreTable { scorer: self.recipe(), ..table })
    }
}
