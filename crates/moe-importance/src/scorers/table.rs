//! Building score tables.

use moe_checkpoint::{Denominator, Granularity, LayerScores, Pool, ScoreTable, Statistics};
use rayon::prelude::*;

use super::Scorer;
use crate::collectors::ROUTED_TOKENS;
use crate::{Error, Result};

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
            scores: scores.collect::<Result<_>>()?,
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

/// Tokens routed to each expert of a layer, if they were counted.
pub(super) fn routed(statistics: &Statistics, layer: usize) -> Result<Option<Vec<u64>>> {
    if !statistics.contains(ROUTED_TOKENS.as_str()) {
        return Ok(None);
    }
    let counts = statistics.expert(ROUTED_TOKENS.as_str(), layer)?;
    Ok(Some(counts.iter().map(|count| count.round() as u64).collect()))
}
