//! A scorer of experts as a scorer of units.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::table;
use super::{ExpertWeightsSource, Magnitude, Needs, Reap, Scorer, ScorerConfig};
use crate::{Error, Result};

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
    if scorer.needs().granularity == granularity {
        return Ok(scorer);
    }
    let expected = if granularity == Granularity::Unit { "units" } else { "experts" };
    Err(Error::InvalidField {
        scorer: outer.name().into(),
        field: field.into(),
        reason: format!("found scorer `{}`, expected a scorer of {expected}", scorer.name()),
    })
}

/// What scores of units need that come from scores of experts and of units below them, and what they are good for.
pub(super) fn combined_needs(experts: Needs, units: Needs, combine: Combine) -> Needs {
    let mut statistics = experts.statistics;
    statistics.extend(units.statistics.into_iter().filter(|id| !statistics.contains(id)).collect::<Vec<_>>());
    let needs = Needs::units(statistics).weights(experts.weights || units.weights);
    match (combine, units.additive) {
        // Ranks say which is more, not how much.
        (Combine::TieBreak, _) => needs.within(experts.pool),
        (Combine::Multiply, Some(pool)) => needs.within(experts.pool.min(units.pool)).additive(pool),
        (Combine::Multiply, None) => needs.within(experts.pool.min(units.pool)),
    }
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
        return Ok(ScoreTable { scorer: scorer.recipe().to_string(), ..table });
    }
    let values = |table: &ScoreTable, layer: usize, expert: usize| {
        table.layer(layer).map(|l| l.scores[expert].clone()).unwrap_or_default()
    };
    table(scorer, statistics, experts.denominator, |layer, expert, _| {
        let factor = f64::from(values(experts, layer, expert)[0]);
        Ok(values(units, layer, expert).into_iter().map(|unit| factor * f64::from(unit)).collect())
    })
}

impl Scorer for Units {
    fn name(&self) -> &str {
        "units"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(self.clone())
    }

    fn validate(&self) -> Result<()> {
        nested(self, "of", &self.of, Granularity::Expert)?;
        nested(self, "tie_breaker", &self.tie_breaker, Granularity::Unit)?;
        Ok(())
    }

    fn needs(&self) -> Needs {
        // Parameters that do not build are refused by `validate`, not here.
        let of = |config: &ScorerConfig, none: Needs| config.build().map_or(none, |scorer| scorer.needs());
        combined_needs(of(&self.of, Needs::experts([])), of(&self.tie_breaker, Needs::units([])), self.combine)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let experts = nested(self, "of", &self.of, Granularity::Expert)?.score(statistics, weights)?;
        let units = nested(self, "tie_breaker", &self.tie_breaker, Granularity::Unit)?.score(statistics, weights)?;
        combine_tables(self, statistics, &experts, &units, self.combine)
    }
}
