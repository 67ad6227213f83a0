//! Unit scores to expert scores and back: what lets any scorer feed any pruner.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use crate::{Denominator, Error, Granularity, LayerScores, Pool, Result, ScoreTable};

/// How the scores of an expert's units become the score of the expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reduction {
    /// The sum, in f64.
    Sum,
    /// The mean, in f64.
    Mean,
    /// The largest.
    Max,
    /// The mean of the n largest, in f64; of all where there are fewer. As JSON `{"top": n}`.
    Top(NonZeroUsize),
}

impl Reduction {
    /// Of no values: 0.
    fn apply(self, values: &[f32]) -> f32 {
        let sum = || values.iter().copied().map(f64::from).sum::<f64>();
        match self {
            _ if values.is_empty() => 0.0,
            Reduction::Sum => sum() as f32,
            Reduction::Mean => (sum() / values.len() as f64) as f32,
            Reduction::Max => values.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            Reduction::Top(n) => {
                let mut values = values.to_vec();
                values.sort_unstable_by(|a, b| b.total_cmp(a));
                values.truncate(n.get());
                Reduction::Mean.apply(&values)
            }
        }
    }
}

impl ScoreTable {
    /// One score per expert from the scores of its units; an expert without units scores 0. A table of experts is
    /// returned as it is.
    ///
    /// The result is additive if it is a sum of scores that were, over more than their expert.
    ///
    /// # Errors
    /// [`Error::InvalidScores`] for the sum of scores that are not additive; those of [`ScoreTable::validate`], of this
    /// table and of the reduced one (a sum can overflow).
    pub fn to_experts(&self, reduction: Reduction) -> Result<ScoreTable> {
        self.validate()?;
        let mut table = self.clone();
        if self.granularity == Granularity::Unit {
            if reduction == Reduction::Sum && !self.adds_up(Pool::Expert) {
                let reason = format!("scores of `{}` may not be added; take their mean, maximum or top", self.scorer);
                return Err(Error::InvalidScores { reason });
            }
            table.additive = self.additive.filter(|pool| reduction == Reduction::Sum && *pool > Pool::Expert);
            table.granularity = Granularity::Expert;
            for layer in &mut table.layers {
                layer.scores.iter_mut().for_each(|values| *values = vec![reduction.apply(values)]);
                layer.whole = None;
            }
            table.validate()?;
        }
        Ok(table)
    }

    /// Unit scores from expert scores and a unit tie-breaker: units are ordered by the score of their expert first, the
    /// tie-breaker orders only those whose experts score the same. The values of the result are ranks within the pool
    /// of `experts` (units equal in both share a rank), since no f32 holds a pair.
    ///
    /// Where the tie-breaker may not be compared over that whole pool, the units of equal experts are ordered by layer
    /// (and expert) first, so that the tie-breaker is only read inside its own pool.
    ///
    /// # Errors
    /// [`Error::InvalidScores`] if the granularities, layers or expert counts do not fit, if the tables are of
    /// different models, or for more units than distinct f32 values; those of [`ScoreTable::validate`].
    pub fn broadcast(experts: &ScoreTable, tie_breaker: &ScoreTable) -> Result<ScoreTable> {
        experts.validate()?;
        tie_breaker.validate()?;
        let invalid = |reason: String| Err(Error::InvalidScores { reason });
        if experts.granularity != Granularity::Expert || tie_breaker.granularity != Granularity::Unit {
            return invalid(format!(
                "broadcast takes expert scores and a unit tie-breaker, found {} and {}",
                experts.granularity, tie_breaker.granularity
            ));
        }
        let (model, tie_model) = (&experts.provenance.model, &tie_breaker.provenance.model);
        if model != tie_model {
            return invalid(format!("expert scores of model `{model}`, but a tie-breaker of model `{tie_model}`"));
        }
        let sizes = |t: &ScoreTable| t.layers.iter().map(|l| (l.layer, l.scores.len())).collect::<Vec<_>>();
        let (found, expected) = (sizes(tie_breaker), sizes(experts));
        if found != expected {
            return invalid(format!("tie-breaker of (layer, experts) {found:?}, expert scores of {expected:?}"));
        }
        let mut table = ScoreTable {
            scorer: experts.scorer.clone(),
            granularity: Granularity::Unit,
            pool: experts.pool,
            additive: None,
            denominator: Denominator::Ranks,
            provenance: experts.provenance.clone(),
            layers: experts
                .layers
                .iter()
                .zip(&tie_breaker.layers)
                .map(|(e, t)| LayerScores {
                    layer: e.layer,
                    scores: t.scores.clone(),
                    routed: e.routed.clone(),
                    whole: None,
                })
                .collect(),
        };
        let mut units: Vec<Unit> = Vec::new();
        for (position, (e, t)) in experts.layers.iter().zip(&tie_breaker.layers).enumerate() {
            for (expert, ties) in t.scores.iter().enumerate() {
                let pool = group(experts.pool, position, expert);
                let inner = group(tie_breaker.pool, position, expert);
                let score = e.scores[expert][0];
                let place = |unit| (position, expert, unit);
                units.extend(ties.iter().enumerate().map(|(u, tie)| Unit {
                    pool,
                    score,
                    inner,
                    tie: *tie,
                    place: place(u),
                }));
            }
        }
        // The sort is stable: units equal in everything stay in natural order.
        units.sort_by(Unit::compare);
        let mut rank = 0u32;
        for index in 0..units.len() {
            if index > 0 {
                let (last, this) = (&units[index - 1], &units[index]);
                if last.pool != this.pool {
                    rank = 0;
                } else if last.compare(this).is_ne() {
                    rank += 1;
                }
            }
            let (position, expert, unit) = units[index].place;
            table.layers[position].scores[expert][unit] = rank_value(rank)?;
        }
        Ok(table)
    }
}

/// One unit of [`ScoreTable::broadcast`], with the keys that order it.
struct Unit {
    pool: (usize, usize),
    score: f32,
    inner: (usize, usize),
    tie: f32,
    place: (usize, usize, usize),
}

impl Unit {
    fn compare(&self, other: &Self) -> std::cmp::Ordering {
        // Scores are finite, and adding zero makes -0.0 equal to 0.0.
        let score = |unit: &Self| unit.score + 0.0;
        let tie = |unit: &Self| unit.tie + 0.0;
        self.pool
            .cmp(&other.pool)
            .then(score(self).total_cmp(&score(other)))
            .then(self.inner.cmp(&other.inner))
            .then(tie(self).total_cmp(&tie(other)))
    }
}

/// The pool that an expert's units belong to.
fn group(pool: Pool, position: usize, expert: usize) -> (usize, usize) {
    match pool {
        Pool::Global => (0, 0),
        Pool::Layer => (position, 0),
        Pool::Expert => (position, expert),
    }
}

/// The rank itself while f32 counts exactly, then the following floats: consecutive bit patterns of positive floats are
/// ascending numbers.
fn rank_value(rank: u32) -> Result<f32> {
    const EXACT: u32 = 1 << 24;
    let value = match rank.checked_sub(EXACT) {
        None => rank as f32,
        Some(beyond) => f32::from_bits((EXACT as f32).to_bits().saturating_add(beyond)),
    };
    if value.is_finite() { Ok(value) } else { Err(Error::InvalidScores { reason: "too many distinct units".into() }) }
}
