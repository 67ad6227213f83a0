//! Building score tables.

use moe_checkpoint::{Denominator, Granularity, LayerScores, Pool, ScoreTable, Statistics, collect_in_order};
use rayon::prelude::*;

use super::{Average, Scorer};
use crate::collectors::ROUTED_TOKENS;
use crate::{Error, Result, StatisticId};

/// Checks that `statistics` hold what `scorer` needs.
pub(super) fn check_needs(scorer: &dyn Scorer, statistics: &Statistics) -> Result<()> {
    match scorer.needs().iter().find(|id| !statistics.contains(id.as_str())) {
        None => Ok(()),
        Some(id) => Err(Error::MissingStatistic {
            scorer: scorer.name().into(),
            id: id.to_string(),
            found: match statistics.ids().collect::<Vec<_>>().join(", ") {
                ids if ids.is_empty() => "none".into(),
                ids => ids,
            },
        }),
    }
}

/// `count` as a divisor.
pub(super) fn divisor(scorer: &dyn Scorer, count: u64, counted: &'static str) -> Result<f64> {
    match count {
        0 => Err(Error::NoData { what: format!("scorer `{}`", scorer.name()), counted }),
        count => Ok(count as f64),
    }
}

/// A table of `f(layer, expert, width)`, one value per unit or one per expert, computed in parallel over experts and
/// checked to be finite.
pub(super) fn table(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    granularity: Granularity,
    pool: Pool,
    denominator: Denominator,
    f: impl Fn(usize, usize, usize) -> Result<Vec<f64>> + Sync,
) -> Result<ScoreTable> {
    let layers = statistics.shape().layers.iter().map(|layer| {
        let scores = layer.widths.par_iter().enumerate().map(|(expert, width)| {
            let values = f(layer.layer, expert, *width)?;
            let scores: Vec<f32> = values.iter().map(|value| *value as f32).collect();
            match scores.iter().position(|score| !score.is_finite()) {
                None => Ok(scores),
                Some(unit) => Err(Error::NonFiniteScore {
                    scorer: scorer.name().into(),
                    layer: layer.layer,
                    expert,
                    unit,
                    value: values[unit],
                }),
            }
        });
        Ok(LayerScores {
            layer: layer.layer,
            scores: collect_in_order(scores)?,
            routed: routed(statistics, layer.layer)?,
        })
    });
    let table = ScoreTable {
        scorer: scorer.recipe(),
        granularity,
        pool,
        denominator,
        layers: layers.collect::<Result<_>>()?,
        provenance: statistics.provenance().clone(),
    };
    table.validate_for(statistics.shape())?;
    Ok(table)
}

/// A table with one score per expert.
pub(super) fn expert_table(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    denominator: Denominator,
    f: impl Fn(usize, usize) -> Result<f64> + Sync,
) -> Result<ScoreTable> {
    check_needs(scorer, statistics)?;
    table(scorer, statistics, Granularity::Expert, Pool::Global, denominator, |layer, expert, _| {
        Ok(vec![f(layer, expert)?])
    })
}

/// Averages of a statistic with a value per expert.
pub(super) fn expert_means(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    id: &StatisticId,
    average: Average,
) -> Result<ScoreTable> {
    expert_table(scorer, statistics, average.denominator(), |layer, expert| {
        let tokens = average.tokens(scorer, statistics, layer, expert)?;
        Ok(statistics.expert(id.as_str(), layer)?[expert] / tokens)
    })
}

/// Averages of a statistic with a value per unit, each turned into a score by `f`.
pub(super) fn unit_means(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    id: &StatisticId,
    average: Average,
    f: impl Fn(f64) -> f64 + Sync,
) -> Result<ScoreTable> {
    check_needs(scorer, statistics)?;
    table(scorer, statistics, Granularity::Unit, Pool::Global, average.denominator(), |layer, expert, _| {
        let tokens = average.tokens(scorer, statistics, layer, expert)?;
        Ok(statistics.unit(id.as_str(), layer, expert)?.iter().map(|sum| f(sum / tokens)).collect())
    })
}

/// Tokens routed to each expert of a layer, if they were counted.
pub(super) fn routed(statistics: &Statistics, layer: usize) -> Result<Option<Vec<u64>>> {
    if !statistics.contains(ROUTED_TOKENS.as_str()) {
        return Ok(None);
    }
    let counts = statistics.expert(ROUTED_TOKENS.as_str(), layer)?;
    Ok(Some(counts.iter().map(|count| count.round() as u64).collect()))
}
