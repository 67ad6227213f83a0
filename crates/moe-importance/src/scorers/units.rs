//! A scorer of experts as a scorer of units.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::table;
use super::{ExpertWeightsSource, Magnitude, Reap, Scorer, ScorerConfig};
use crate::{Error, Result, StatisticId};

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

/// Scores of experts, and a scorer of units below them: what makes any expert criterion a unit criterion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Units {
    /// A scorer of experts; default [`Reap`].
    pub of: Box<ScorerConfig>,
    /// A scorer of units; default [`Magnitude`], which needs no data.
    pub tie_breaker: Box<ScorerConfig>,
    /// Default [`Combine::TieBreak`].
    pub combine: Combine,
}

impl Default for Units {
    fn default() -> Self {
        Self::new(Reap::default(), Magnitude::new(), Combine::default())
    }
}

impl Units {
    /// With these parameters; [`Scorer::validate`] checks that one scores experts and the other units.
    pub fn new(of: impl Into<ScorerConfig>, tie_breaker: impl Into<ScorerConfig>, combine: Combine) -> Self {
        Self { of: Box::new(of.into()), tie_breaker: Box::new(tie_breaker.into()), combine }
    }
}

/// A nested scorer, of this granularity.
pub(super) fn nested(
    outer: &dyn Scorer,
    field: &str,
    config: &ScorerConfig,
    granularity: Granularity,
) -> Result<Box<dyn Scorer>> {
    let scorer = config.build()?;
    if scorer.granularity() == granularity {
        return Ok(scorer);
    }
    let expected = if granularity == Granularity::Unit { "units" } else { "experts" };
    Err(Error::InvalidField {
        scorer: outer.name().into(),
        field: field.into(),
        reason: format!("found scorer `{}`, expected a scorer of {expected}", scorer.name()),
    })
}

/// What two scorers need, each once.
pub(super) fn needs_of(scorers: &[&dyn Scorer]) -> Vec<StatisticId> {
    let mut needs: Vec<StatisticId> = Vec::new();
    for id in scorers.iter().flat_map(|scorer| scorer.needs()) {
        if !needs.contains(&id) {
            needs.push(id);
        }
    }
    needs
}

/// Unit scores from a table of experts and a table of units, as those of `scorer`.
pub(super) fn combine_tables(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    experts: &ScoreTable,
    units: &ScoreTable,
    combine: Combine,
) -> Result<ScoreTable> {
    if combine == Combine::TieBreak {
        let table = ScoreTable::broadcast(experts, units)?;
        return Ok(ScoreTable { scorer: scorer.recipe(), ..table });
    }
    let values = |table: &ScoreTable, layer: usize, expert: usize| {
        table.layer(layer).map(|l| l.scores[expert].clone()).unwrap_or_default()
    };
    let pool = experts.pool.min(units.pool);
    table(scorer, statistics, Granularity::Unit, pool, experts.denominator, |layer, expert, _| {
        let factor = f64::from(values(experts, layer, expert)[0]);
        Ok(values(units, layer, expert).into_iter().map(|unit| factor * f64::from(unit)).collect())
    })
}

impl Scorer for Units {
    fn name(&self) -> &'static str {
        "units"
    }

    fn recipe(&self) -> String {
        super::config::recipe(self.clone())
    }

    fn granularity(&self) -> Granularity {
        Granularity::Unit
    }

    fn validate(&self) -> Result<()> {
        nested(self, "of", &self.of, Granularity::Expert)?;
        nested(self, "tie_breaker", &self.tie_breaker, Granularity::Unit)?;
        Ok(())
    }

    fn needs(&self) -> Vec<StatisticId> {
        // Parameters that do not build are refused by `validate`, not here.
        let nested = [&self.of, &self.tie_breaker].map(|config| config.build().ok());
        needs_of(&nested.iter().flatten().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    fn reads_weights(&self) -> bool {
        [&self.of, &self.tie_breaker].iter().any(|config| config.build().is_ok_and(|scorer| scorer.reads_weights()))
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let experts = nested(self, "of", &self.of, Granularity::Expert)?.score(statistics, weights)?;
        let units = nested(self, "tie_breaker", &self.tie_breaker, Granularity::Unit)?.score(statistics, weights)?;
        combine_tables(self, statistics, &experts, &units, self.combine)
    }
}
