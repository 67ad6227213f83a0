//! What every expert has to do with what its layer adds to the residual stream.

use std::collections::BTreeMap;

use moe_checkpoint::{Fold, Statistics};
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerOutput, Signals, WaveInfo};
use rayon::prelude::*;

use super::{Collector, outputs};
use crate::statistics::{ATTRIBUTION, ATTRIBUTION_CLIPPED, ATTRIBUTION_SQUARE, COALITION, StatisticId, StatisticSpec};
use crate::{Error, Result};

pub(super) const PROVIDED: &[StatisticId] = &[ATTRIBUTION, ATTRIBUTION_CLIPPED, ATTRIBUTION_SQUARE, COALITION];

/// Added to the squared norm of the residual stream.
const EPSILON: f64 = 1e-6;
/// Part of the sizes of a coordinate that are not clipped.
const QUANTILE: f64 = 0.99;

/// [`ATTRIBUTION`], [`ATTRIBUTION_CLIPPED`], [`ATTRIBUTION_SQUARE`] and [`COALITION`].
///
/// With o the output of an expert times its routing weight (and the factor of the residual branch, where a family has
/// one), m the sum of o over the experts of a token and y the residual stream after the layer, scaling the routed
/// experts by alpha changes the stream by `(alpha - 1) m`. The loss `sum_t |y' - y|^2 / (|y|^2 + 1e-6)` then has the
/// gradient `-2 alpha (1 - alpha) <m, o> / (|y|^2 + 1e-6)` along an expert's output: an inner product instead of a
/// backward sweep.
///
/// The sum m is known when all experts of a layer have been seen, so that the outputs of one layer are kept until then:
/// `T k H` numbers of a wave of T tokens, more than any other collector. What of them is kept over layers is two
/// numbers per token. A wave that was stopped begins anew.
///
/// Source: attribution of MoE-Slimming, "Attribution-Guided and Coverage-Maximized Pruning for Structural MoE
/// Compression", ICML 2026, in closed form.
#[derive(Debug)]
pub struct Attribution {
    statistics: Vec<StatisticSpec>,
    tokens: usize,
    /// By layer, `1 / (|y_t|^2 + 1e-6)` of every token and the factor of the residual branch.
    streams: BTreeMap<usize, (Vec<f64>, f64)>,
    /// By layer, what its experts add.
    shown: BTreeMap<usize, Vec<Shown>>,
}

/// What one expert adds to the stream of its tokens.
#[derive(Debug)]
struct Shown {
    expert: usize,
    rows: Vec<u32>,
    /// `[n, H]`.
    added: Vec<f32>,
}

impl Attribution {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).cloned().map(StatisticSpec::expert_sum);
        Self { statistics: statistics.collect(), tokens: 0, streams: BTreeMap::new(), shown: BTreeMap::new() }
    }
}

impl Collector for Attribution {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::OUTPUTS | Signals::STREAMS
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.tokens = wave.tokens;
        self.streams.clear();
        self.shown.clear();
        Ok(())
    }

    fn output(&mut self, output: &LayerOutput<'_>, _: &mut Statistics) -> Result<()> {
        let view = HostView::new(output.output);
        let inverse = |row: &[f32]| 1.0 / (dot(row, row) + EPSILON);
        let width = output.output.dims()[1].max(1);
        let inverses = view.as_slice().par_chunks_exact(width).map(inverse).collect();
        self.streams.insert(output.layer, (inverses, f64::from(output.residual_factor)));
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, _: &mut Statistics) -> Result<()> {
        let outputs = outputs(trace)?; // [n, H]
        let hidden = outputs.dims()[1].max(1);
        let view = HostView::new(outputs);
        let mut added = view.as_slice().to_vec();
        let rows = added.par_chunks_exact_mut(hidden).zip(trace.routing_weights);
        rows.for_each(|(row, weight)| row.iter_mut().for_each(|value| *value *= weight));
        let shown = Shown { expert: trace.expert, rows: trace.rows.to_vec(), added };
        self.shown.entry(trace.layer).or_default().push(shown);
        Ok(())
    }

    fn end_layer(&mut self, layer: usize, into: &mut Statistics) -> Result<()> {
        let Some(shown) = self.shown.remove(&layer) else { return Ok(()) };
        let hidden = shown.iter().find(|s| !s.rows.is_empty()).map_or(1, |s| s.added.len() / s.rows.len());
        let missing = || Error::Trace {
            layer,
            expert: None,
            field: "output",
            found: "no residual stream after the layer".into(),
            expected: format!("{} rows of {hidden} values", self.tokens),
        };
        let (inverses, factor) =
            self.streams.remove(&layer).filter(|(i, _)| i.len() == self.tokens).ok_or_else(missing)?;
        // What all experts of a token add, in the order of the experts.
        let mut together = vec![0.0f32; self.tokens * hidden];
        for of in &shown {
            for (token, row) in of.rows.iter().zip(of.added.chunks_exact(hidden)) {
                let sum = &mut together[*token as usize * hidden..][..hidden];
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
        }
        let (together, inverses, square) = (&together, &inverses, factor * factor);
        let sum_of = |of: &Shown, value: Term<'_>| -> f64 {
            let rows = of.rows.iter().zip(of.added.chunks_exact(hidden));
            rows.map(|(t, row)| value(*t as usize, &together[*t as usize * hidden..][..hidden], row)).sum()
        };
        for StatisticSpec { id, .. } in &self.statistics {
            let of_expert = |of: &Shown| -> f64 {
                match id {
                    id if *id == ATTRIBUTION => square * sum_of(of, &|t, m, o| dot(m, o) * inverses[t]),
                    id if *id == ATTRIBUTION_SQUARE => square * sum_of(of, &|t, _, o| dot(o, o) * inverses[t]),
                    id if *id == COALITION => sum_of(of, &|_, m, o| match dot(m, m) {
                        all if all > 0.0 => dot(m, o) / all,
                        _ => 0.0,
                    }),
                    _ => square * clipped(of, together, inverses, hidden),
                }
            };
            let sums: Vec<(usize, f64)> = shown.par_iter().map(|of| (of.expert, of_expert(of))).collect();
            let out = into.expert_mut(id.as_str(), Fold::Sum, layer)?;
            sums.into_iter().for_each(|(expert, sum)| out[expert] += sum);
        }
        Ok(())
    }
}

/// What a token gives to a sum, of its number, what all of its experts add, and what one of them adds.
type Term<'a> = &'a (dyn Fn(usize, &[f32], &[f32]) -> f64 + Sync);

/// `sum_h sum_t` of `m_t[h] o_t[h] / (|y_t|^2 + 1e-6)`, every coordinate clipped to the quantile of its sizes.
fn clipped(of: &Shown, together: &[f32], inverses: &[f64], hidden: usize) -> f64 {
    let mut sizes = vec![0.0; of.rows.len()];
    let column = |h: usize| {
        of.rows.iter().zip(of.added.chunks_exact(hidden)).map(move |(token, row)| {
            let t = *token as usize;
            f64::from(together[t * hidden + h]) * f64::from(row[h]) * inverses[t]
        })
    };
    let mut sum = 0.0;
    for h in 0..hidden {
        let bound = match of.rows.len() {
            0..=2 => f64::INFINITY,
            _ => {
                sizes.iter_mut().zip(column(h)).for_each(|(size, value)| *size = value.abs());
                quantile(&mut sizes, QUANTILE)
            }
        };
        sum += column(h).map(|value| value.clamp(-bound, bound)).sum::<f64>();
    }
    sum
}

/// The quantile of values, linear between neighbors.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    let place = part * (values.len() - 1) as f64;
    let (below, rest) = (place.floor() as usize, place.fract());
    let (_, low, above) = values.select_nth_unstable_by(below, f64::total_cmp);
    let low = *low;
    match rest > 0.0 {
        false => low,
        true => low + rest * (above.iter().copied().fold(f64::INFINITY, f64::min) - low),
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_between_its_neighbors() {
        let mut values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.99), 99.0);
        let mut values = vec![3.0, 1.0, 2.0];
        assert!((quantile(&mut values, 0.99) - 2.98).abs() < 1e-12);
        assert_eq!(quantile(&mut [7.0], 0.99), 7.0);
    }

    #[test]
    fn clipping_holds_an_outlier_back_and_leaves_two_rows_alone() {
        let tokens = 200;
        let mut added = vec![1.0f32; tokens];
        added[17] = 1000.0;
        let of = Shown { expert: 0, rows: (0..tokens as u32).collect(), added };
        let (together, inverses) = (vec![1.0; tokens], vec![1.0; tokens]);
        let plain = 199.0 + 1000.0;
        let found = clipped(&of, &together, &inverses, 1);
        // Without the outlier the sum is 200; all of it would be 999 more.
        assert!(found - 200.0 < 10.0 && found < plain, "{found}");
        let two = Shown { expert: 0, rows: vec![0, 1], added: vec![1.0, 1000.0] };
        assert_eq!(clipped(&two, &together, &inverses, 1), 1001.0);
    }
}
