//! Building score tables.

use moe_checkpoint::{Denominator, LayerScores, ScoreTable, Statistics, collect_in_order};
use rayon::prelude::*;

use super::{Average, Needs, Scorer};
use crate::statistics::ROUTED_TOKENS;
use crate::{Error, Result, StatisticId};

/// Checks that `statistics` hold what `scorer` needs.
///
/// # Errors
/// [`Error::MissingStatistic`] names the first that is missing.
pub fn check_needs(scorer: &dyn Scorer, statistics: &Statistics) -> Result<()> {
    match scorer.needs().statistics.iter().find(|id| !statistics.contains(id.as_str())) {
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

/// A table of `f(layer, expert, width)`, one value per unit or one per expert as `scorer` declares, computed in
/// parallel over experts and checked to be finite. `denominator` is what `f` divides by.
///
/// # Errors
/// Those of `f`, of the first expert that has one; [`Error::NonFiniteScore`]; values of another number than there are
/// units.
pub fn table(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    denominator: Denominator,
    f: impl Fn(usize, usize, usize) -> Result<Vec<f64>> + Sync,
) -> Result<ScoreTable> {
    table_as(scorer, scorer.needs(), statistics, denominator, f)
}

/// As [`table`], of what `needs` says instead of the scorer.
fn table_as(
    scorer: &dyn Scorer,
    needs: Needs,
    statistics: &Statistics,
    denominator: Denominator,
    f: impl Fn(usize, usize, usize) -> Result<Vec<f64>> + Sync,
) -> Result<ScoreTable> {
    let Needs { granularity, pool, additive, .. } = needs;
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
            whole: None,
        })
    });
    let table = ScoreTable {
        scorer: scorer.recipe().to_string(),
        granularity,
        pool,
        additive,
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
    table(scorer, statistics, denominator, |layer, expert, _| Ok(vec![f(layer, expert)?]))
}

/// Averages of a statistic with a value per expert.
pub(super) fn expert_means(
    scorer: &dyn Scorer,
    statistics: &Statistics,
    id: &StatisticId,
    average: Average,
) -> Result<ScoreTable> {
    expert_means_as(scorer, scorer.needs(), statistics, id, average)
}

/// As [`expert_means`], for a scorer that makes something else of them: a table of what `needs` says.
pub(super) fn expert_means_as(
    scorer: &dyn Scorer,
    needs: Needs,
    statistics: &Statistics,
    id: &StatisticId,
    average: Average,
) -> Result<ScoreTable> {
    check_needs(scorer, statistics)?;
    table_as(scorer, needs, statistics, average.denominator(), |layer, expert, _| {
        let tokens = average.tokens(scorer, statistics, layer, expert)?;
        Ok(vec![statistics.expert(id.as_str(), layer)?[expert] / tokens])
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
    table(scorer, statistics, average.denominator(), |layer, expert, _| {
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
