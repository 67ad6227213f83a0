//! Routers of few bits that choose the same experts (router consistency of EAQuant, arXiv 2506.13329).

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::smoothing::{Change, SmoothedSource};
use crate::family::{LayerRole, Role};
use crate::record::Step;
use crate::source::ModelDescription;
use crate::{Checkpoint, Error, Result, Statistics, convert};

/// Clip ratios that are tried, from [`LEAST_CLIP`] to 1 in equal steps: as in the released code.
const RATIOS: usize = 101;
const LEAST_CLIP: f64 = 0.35;

/// Routers rounded to integers, row by row, with the clip ratio after which the leading experts are chosen as before.
///
/// The largest magnitude of a row times the ratio is the largest code's value. Of all ratios the one with the least
/// mean `KL = sum over the leading m experts of p (log p - log p')` is taken, `p` and `p'` the softmax of the logits
/// before and after, `m = k + floor(further (E - k))`. Values are written in the dtype of the router, so that every
/// loader reads them; whoever rounds them to the same number of bits gets the same codes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterRounding {
    /// Bits of a code, 2 to 8; 8 in the published script.
    pub bits: u32,
    /// How many of the experts beyond the chosen ones count, in [0, 1]: 0 by default, as released.
    pub further: f64,
}

impl Default for RouterRounding {
    fn default() -> Self {
        Self { bits: 8, further: 0.0 }
    }
}

/// A sample of what routers read, from a run over calibration data.
#[derive(Clone, Debug)]
pub struct RouterInputs {
    statistics: Arc<Statistics>,
}

/// What rounding a router did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundedRouter {
    /// Decoder layer.
    pub layer: usize,
    /// The clip ratio.
    pub clip: f64,
    /// Mean divergence with it, and without clipping, in nats per token.
    pub divergence: f64,
    /// See [`divergence`](Self::divergence).
    pub unclipped_divergence: f64,
    /// Of the `k` experts with the highest logits, the share that has them still. These are the chosen ones unless the
    /// family adds correction biases or chooses within groups.
    pub overlap: f64,
}

impl RouterInputs {
    /// Rows that are kept of each layer.
    pub const ROWS: usize = 512;

    /// Numbers before every row of the sample that order it.
    pub const KEY: usize = 2;

    /// The name of the sample of a layer in [`Statistics`], `[ROWS, KEY + H]`.
    pub fn statistic(layer: usize) -> String {
        format!("quantize.router_inputs.{layer}")
    }

    /// Those that a run collected.
    pub fn new(statistics: Statistics) -> Self {
        Self { statistics: Arc::new(statistics) }
    }

    /// Why the router of a layer cannot be looked at so; `None` where it can.
    pub fn refusal(model: &Checkpoint) -> Option<String> {
        let config = model.config();
        let apart = config.routing.own_norm || config.routing.on_inputs || config.expert_latent.is_some();
        apart.then(|| "routers of this family do not read what experts read".to_string())
    }
}

fn refused(reason: impl Into<String>) -> Error {
    Error::Quantize { format: "a rounded router".into(), reason: reason.into() }
}

impl RouterRounding {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Quantize`] for bits outside 2 to 8, and for a share outside [0, 1].
    pub fn check(&self) -> Result<()> {
        if !(2..=8).contains(&self.bits) {
            return Err(refused(format!("{} bits; expected 2 to 8", self.bits)));
        }
        if !(0.0..=1.0).contains(&self.further) {
            return Err(refused(format!("`further` is {}; expected a number in [0, 1]", self.further)));
        }
        Ok(())
    }

    /// The model with its routers rounded, and what that did.
    ///
    /// # Errors
    /// [`Error::Quantize`] for other bits or shares, families whose routers do not read what experts read, and a sample
    /// of another model or of no tokens.
    pub fn on(&self, base: &Arc<Checkpoint>, inputs: &RouterInputs) -> Result<(Arc<Checkpoint>, Vec<RoundedRouter>)> {
        self.check()?;
        if let Some(reason) = RouterInputs::refusal(base) {
            return Err(refused(reason));
        }
        let from = base.dequantized()?;
        let (mut changes, mut report) = (BTreeMap::new(), Vec::new());
        for layer in from.shape().layers.iter().map(|layer| layer.layer) {
            let info = from.role(Role::Layer(layer, LayerRole::Router))?;
            let hidden = from.config().hidden_size;
            let (rows, columns) = inputs.statistics.matrix(&RouterInputs::statistic(layer))?;
            if columns != hidden + RouterInputs::KEY || rows.is_empty() {
                let reason = format!("the sample of layer {layer} has {} values in {columns} columns", rows.len());
                return Err(refused(format!("{reason}; expected rows of {} + {hidden}", RouterInputs::KEY)));
            }
            let bias = match from.config().routing.bias {
                true => from.read_f32(Role::Layer(layer, LayerRole::RouterBias))?,
                false => Vec::new(),
            };
            let tokens: Vec<&[f64]> = rows.chunks_exact(columns).map(|row| &row[RouterInputs::KEY..]).collect();
            let weights = from.tensor_f32(&info.name)?;
            let seen = Seen { tokens, bias, hidden, top_k: from.config().routing.top_k };
            let (values, clip, divergence, unclipped, overlap) = self.best(&weights, &seen, info.dtype);
            changes.insert(info.name.clone(), Change::Values(values));
            report.push(RoundedRouter { layer, clip, divergence, unclipped_divergence: unclipped, overlap });
        }
        let clips: Vec<f64> = report.iter().map(|router| router.clip).collect();
        let recipe = serde_json::json!({ "rounding": self, "clips": clips });
        let step = Step::new("round_routers", &from, recipe, format!("routers rounded to {} bits", self.bits));
        let source = SmoothedSource::new(from.clone(), changes, BTreeMap::new(), step);
        let model = Checkpoint::from_source(ModelDescription::of(&from), Arc::new(source))?;
        Ok((Arc::new(model), report))
    }

    /// Values, ratio, divergence with it and without clipping, and overlap.
    fn best(&self, weights: &[f32], seen: &Seen<'_>, dtype: crate::Dtype) -> (Vec<f32>, f64, f64, f64, f64) {
        let before = seen.logits(weights);
        let tried: Vec<(f64, f64)> = (0..RATIOS)
            .into_par_iter()
            .map(|step| {
                let ratio = LEAST_CLIP + (1.0 - LEAST_CLIP) * step as f64 / (RATIOS - 1) as f64;
                let after = seen.logits(&self.rounded(weights, seen.hidden, ratio, dtype));
                (ratio, self.divergence(&before, &after, seen.top_k))
            })
            .collect();
        let unclipped = tried.last().map_or(0.0, |(_, divergence)| *divergence);
        // Of equal ones the one that clips least.
        let best = tried.iter().rev().min_by(|(_, a), (_, b)| a.total_cmp(b)).copied().unwrap_or((1.0, unclipped));
        let values = self.rounded(weights, seen.hidden, best.0, dtype);
        let overlap = overlap(&before, &seen.logits(&values), seen.top_k);
        (values, best.0, best.1, unclipped, overlap)
    }

    /// A router `[E, H]` rounded row by row, as its dtype holds it.
    fn rounded(&self, weights: &[f32], hidden: usize, ratio: f64, dtype: crate::Dtype) -> Vec<f32> {
        let most = ((1i32 << (self.bits - 1)) - 1) as f32;
        let mut out = Vec::with_capacity(weights.len());
        for row in weights.chunks(hidden.max(1)) {
            let largest = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let scale = half::bf16::from_f32(largest * ratio as f32 / most).to_f32();
            let scale = if scale > 0.0 { scale } else { 1.0 };
            out.extend(row.iter().map(|value| (value / scale).round_ties_even().clamp(-most - 1.0, most) * scale));
        }
        let (mut bytes, mut stored) = (Vec::new(), Vec::new());
        convert::encode(dtype, &out, &mut bytes);
        convert::decode_f32(dtype, &bytes, &mut stored);
        stored
    }

    /// Mean divergence over the leading experts, in nats per token.
    fn divergence(&self, before: &[Vec<f64>], after: &[Vec<f64>], top_k: usize) -> f64 {
        let one = |(before, after): (&Vec<f64>, &Vec<f64>)| {
            let experts = before.len();
            let leading = top_k + (self.further * experts.saturating_sub(top_k) as f64).floor() as usize;
            let (old, new) = (log_softmax(before), log_softmax(after));
            order(before).into_iter().take(leading).map(|e| old[e].exp() * (old[e] - new[e])).sum::<f64>()
        };
        before.iter().zip(after).map(one).sum::<f64>() / before.len().max(1) as f64
    }
}

/// Tokens that a router sees.
struct Seen<'a> {
    tokens: Vec<&'a [f64]>,
    bias: Vec<f32>,
    hidden: usize,
    top_k: usize,
}

impl Seen<'_> {
    fn logits(&self, weights: &[f32]) -> Vec<Vec<f64>> {
        let of = |token: &&[f64]| {
            let rows = weights.chunks(self.hidden.max(1)).enumerate();
            let bias = |e: usize| self.bias.get(e).copied().map_or(0.0, f64::from);
            rows.map(|(e, row)| bias(e) + row.iter().zip(*token).map(|(w, x)| f64::from(*w) * x).sum::<f64>()).collect()
        };
        self.tokens.iter().map(of).collect()
    }
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().fold(f64::MIN, |most, logit| most.max(*logit));
    let total = logits.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln() + most;
    logits.iter().map(|logit| logit - total).collect()
}

/// Experts by logits, the highest first, the lower number of two equal ones.
fn order(logits: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    order
}

/// Share of the leading experts that lead still.
fn overlap(before: &[Vec<f64>], after: &[Vec<f64>], top_k: usize) -> f64 {
    let same = |(before, after): (&Vec<f64>, &Vec<f64>)| {
        let (old, new) = (order(before), order(after));
        let new = &new[..top_k.min(new.len())];
        old.iter().take(top_k).filter(|expert| new.contains(expert)).count()
    };
    let all = (before.len() * top_k).max(1);
    before.iter().zip(after).map(same).sum::<usize>() as f64 / all as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    struct Toy {
        weights: Vec<f32>,
        tokens: Vec<Vec<f64>>,
    }

    /// A router with one weight in every row that is far larger than the others, on a channel that is nearly always 0.
    fn toy(experts: usize, hidden: usize) -> Toy {
        let mut state = 11u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f64 / f64::from(1u32 << 23) - 1.0
        };
        let mut weights: Vec<f32> = (0..experts * hidden).map(|_| next() as f32).collect();
        weights.iter_mut().step_by(hidden).for_each(|first| *first = 2.5);
        let mut tokens: Vec<Vec<f64>> = (0..200).map(|_| (0..hidden).map(|_| next()).collect()).collect();
        tokens.iter_mut().for_each(|token| token[0] *= 0.01);
        Toy { weights, tokens }
    }

    fn seen(toy: &Toy, hidden: usize) -> Seen<'_> {
        Seen { tokens: toy.tokens.iter().map(Vec::as_slice).collect(), bias: Vec::new(), hidden, top_k: 2 }
    }

    #[test]
    fn the_clip_ratio_keeps_the_choice_of_experts_better_than_the_least_squares_do() {
        let (experts, hidden) = (16, 32);
        let toy = toy(experts, hidden);
        let seen = seen(&toy, hidden);
        let rounding = RouterRounding { bits: 3, ..RouterRounding::default() };
        let (values, clip, divergence, unclipped, overlapping) = rounding.best(&toy.weights, &seen, Dtype::F32);
        assert!(clip < 1.0 && divergence < unclipped, "{clip}: {divergence} of {unclipped}");
        // The ratio of least squared change of the weights themselves.
        let change = |ratio: &f64| {
            let rounded = rounding.rounded(&toy.weights, hidden, *ratio, Dtype::F32);
            rounded.iter().zip(&toy.weights).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        let ratios: Vec<f64> = (0..RATIOS).map(|step| LEAST_CLIP + (1.0 - LEAST_CLIP) * step as f64 / 100.0).collect();
        let squares = ratios.iter().copied().min_by(|a, b| change(a).total_cmp(&change(b))).unwrap();
        let before = seen.logits(&toy.weights);
        let by_squares = seen.logits(&rounding.rounded(&toy.weights, hidden, squares, Dtype::F32));
        assert!(overlapping > overlap(&before, &by_squares, 2), "{overlapping} at {clip}, squares at {squares}");
        assert_eq!(overlapping, overlap(&before, &seen.logits(&values), 2));
    }

    #[test]
    fn a_router_on_its_grid_diverges_by_nothing_and_is_not_clipped() {
        let (experts, hidden) = (8, 16);
        let mut toy = toy(experts, hidden);
        // Whole numbers up to 127: codes of 8 bits at a scale of 1.
        toy.weights.iter_mut().for_each(|weight| *weight = (*weight * 20.0).round());
        toy.weights.chunks_mut(hidden).for_each(|row| row[3] = 127.0);
        let found = RouterRounding::default().best(&toy.weights, &seen(&toy, hidden), Dtype::BF16);
        assert_eq!((found.0, found.1, found.2, found.4), (toy.weights.clone(), 1.0, 0.0, 1.0));
    }

    #[test]
    fn more_experts_count_where_that_is_asked_for() {
        let before = vec![vec![3.0, 2.0, 1.0, 0.0]];
        let after = vec![vec![3.0, 2.0, 0.0, 1.0]];
        let at = |further| RouterRounding { bits: 8, further }.divergence(&before, &after, 1);
        assert!(at(0.0).abs() < 1e-12, "{}", at(0.0));
        assert!(at(0.7) > 0.05 && at(1.0) > 0.0 && at(1.0) < at(0.7), "{} {}", at(0.7), at(1.0));
    }
}
