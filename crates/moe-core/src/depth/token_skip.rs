//! Tokens that skip the feed-forward half of a layer, by a linear score.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::DepthRule;
use crate::{
    Engine, EngineOptions, Model,
    data::Wave,
    error::{Error, Result},
    host::{self, HostView},
    layers::Norm,
    trace::{LayerOutput, Observer, Signals, WaveInfo},
};

/// Skips the feed-forward half of some layers for tokens that a linear score of the half's normed input says need it
/// least, as gamma-MoD (arXiv 2410.13859) and MindSkip (arXiv 2410.13184) do it at inference. Attention always runs, so
/// that caches are those of the whole model.
///
/// Both train their scores with the model. Here they are fitted to a trained one, in closed form: a score says how much
/// the half would change the token ([`fit`](Self::fit)), and the share of tokens with the smallest scores skips. Scores
/// that were trained elsewhere go in as [`SkipScore`]s.
#[derive(Clone, Debug)]
pub struct TokenSkip {
    layers: BTreeMap<usize, (SkipScore, SkipInput)>,
}

/// What scores of tokens are made of: what enters the feed-forward half of a layer, through the norm of that half.
#[derive(Clone, Debug)]
pub struct SkipInput(Option<Norm>);

impl SkipInput {
    /// That of a layer.
    ///
    /// # Errors
    /// Those of reading the model.
    pub fn of(model: &Model, layer: usize) -> Result<Self> {
        Ok(Self(model.ffn(layer)?.norm))
    }

    /// Of the tokens that enter the half `[T, H]`.
    pub fn read(&self, middle: &Tensor<2>) -> HostView {
        HostView::new(&self.0.as_ref().map_or_else(|| middle.clone(), |norm| norm.forward(middle)))
    }

    /// Gradient at what enters the half, from that at what is [read](Self::read) of it `[T, H]`.
    pub fn backward(&self, middle: &Tensor<2>, d: Tensor<2>) -> Tensor<2> {
        match &self.0 {
            Some(norm) => norm.backward(middle, &d, false),
            None => d,
        }
    }

    /// Gradient at what enters the half, from that at each token's score `weight . read + bias` `[T]`.
    pub fn scores_backward(&self, middle: &Tensor<2>, weight: &[f32], d_scores: &[f32]) -> Tensor<2> {
        let rows = d_scores.iter().flat_map(|d| weight.iter().map(move |w| d * w)).collect();
        self.backward(middle, host::from_vec(rows, middle.dims(), &middle.device()))
    }
}

/// The score of a token in one layer: `weight . norm(x) + bias`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkipScore {
    /// Decoder layer.
    pub layer: usize,
    /// `[H]`.
    pub weight: Vec<f32>,
    /// Added to it.
    pub bias: f32,
    /// A token whose score is below skips.
    pub threshold: f32,
    /// Whether what tokens get is multiplied by the sigmoid of the score, as gamma-MoD multiplies by its softmax over
    /// two logits; else it stays as it is.
    #[serde(default)]
    pub scaled: bool,
}

impl TokenSkip {
    /// Skips by these scores.
    ///
    /// # Errors
    /// [`Error::Input`] for layers that do not exist or are named twice, and weights of another width.
    pub fn new(model: &Model, scores: Vec<SkipScore>) -> Result<Self> {
        let (count, hidden) = (model.config().layers.len(), model.config().hidden_size);
        let mut layers = BTreeMap::new();
        for score in scores {
            let layer = score.layer;
            if layer >= count {
                return Err(Error::input("layer of a skip score", layer, format!("below {count}")));
            }
            if score.weight.len() != hidden {
                return Err(Error::input(format!("skip score of layer {layer}"), score.weight.len(), hidden));
            }
            if layers.insert(layer, (score, SkipInput::of(model, layer)?)).is_some() {
                return Err(Error::input(format!("skip scores of layer {layer}"), "two", "one"));
            }
        }
        Ok(Self { layers })
    }

    /// Scores of MoE layers that predict, from what the half reads, the logarithm of the relative length of what it
    /// would add, `log(|ffn(x)| / |x|)`, by ridge regression over the tokens of `waves`; thresholds are such that
    /// `share` of these tokens skip in every layer.
    ///
    /// # Errors
    /// [`Error::Input`] for a share outside [0, 1), layers without experts, or no tokens; whatever stops the model.
    pub fn fit(model: &Model, layers: &[usize], waves: &[Wave], share: f64, ridge: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&share) {
            return Err(Error::input("share of tokens to skip", share, "a number in [0, 1)"));
        }
        if !(ridge > 0.0 && ridge.is_finite()) {
            return Err(Error::input("ridge", ridge, "a finite number above 0"));
        }
        if let Some(layer) = layers.iter().find(|layer| model.config().moe(**layer).is_none()) {
            return Err(Error::input("layer to skip in", layer, "one with routed experts"));
        }
        let mut inputs = BTreeMap::new();
        for &layer in layers {
            inputs.insert(layer, SkipInput::of(model, layer)?);
        }
        let mut seen = Seen { inputs: inputs.clone(), layers: BTreeMap::new() };
        let engine = Engine::new(model, EngineOptions::default());
        waves.iter().try_for_each(|wave| engine.run(wave, &mut seen).map(drop))?;
        let mut scores = Vec::new();
        for (layer, (inputs, targets)) in &seen.layers {
            let score = regression(*layer, inputs, targets, model.config().hidden_size, share, ridge)?;
            scores.push(score);
        }
        if scores.len() != inputs.len() {
            return Err(Error::input("layers seen", scores.len(), inputs.len()));
        }
        Self::new(model, scores)
    }

    /// The scores, by layer.
    pub fn scores(&self) -> impl Iterator<Item = &SkipScore> {
        self.layers.values().map(|(score, _)| score)
    }
}

fn regression(
    layer: usize,
    inputs: &[f32],
    targets: &[f64],
    hidden: usize,
    share: f64,
    ridge: f64,
) -> Result<SkipScore> {
    let tokens = targets.len();
    if tokens == 0 {
        return Err(Error::input(format!("tokens of layer {layer}"), 0, "at least one"));
    }
    let mean_target = targets.iter().sum::<f64>() / tokens as f64;
    let mut mean = vec![0.0; hidden];
    for row in inputs.chunks_exact(hidden) {
        mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) / tokens as f64);
    }
    let mut gram = faer::Mat::<f64>::zeros(hidden, hidden);
    let mut right = faer::Mat::<f64>::zeros(hidden, 1);
    for (row, target) in inputs.chunks_exact(hidden).zip(targets) {
        let centered: Vec<f64> = row.iter().zip(&mean).map(|(x, m)| f64::from(*x) - m).collect();
        for i in 0..hidden {
            right[(i, 0)] += centered[i] * (target - mean_target);
            for j in 0..=i {
                gram[(i, j)] += centered[i] * centered[j];
            }
        }
    }
    for i in 0..hidden {
        gram[(i, i)] += ridge * tokens as f64;
        for j in 0..i {
            gram[(j, i)] = gram[(i, j)];
        }
    }
    let solved = faer::linalg::solvers::Solve::solve(&gram.partial_piv_lu(), &right);
    let weight: Vec<f32> = (0..hidden).map(|i| solved[(i, 0)] as f32).collect();
    let bias = (mean_target - (0..hidden).map(|i| solved[(i, 0)] * mean[i]).sum::<f64>()) as f32;
    let mut scores: Vec<f32> = inputs.chunks_exact(hidden).map(|row| score(&weight, bias, row)).collect();
    scores.sort_by(f32::total_cmp);
    let skipped = (share * tokens as f64).floor() as usize;
    let threshold = if skipped == 0 { f32::MIN } else { scores[skipped.min(tokens - 1)] };
    Ok(SkipScore { layer, weight, bias, threshold, scaled: false })
}

fn score(weight: &[f32], bias: f32, row: &[f32]) -> f32 {
    weight.iter().zip(row).map(|(w, x)| w * x).sum::<f32>() + bias
}

impl DepthRule for TokenSkip {
    fn is_by_token(&self) -> bool {
        true
    }

    fn factors(&self, layer: usize, middle: &Tensor<2>, _: &WaveInfo) -> Result<Option<Vec<f32>>> {
        let Some((own, input)) = self.layers.get(&layer) else { return Ok(None) };
        let view = input.read(middle);
        let rows = view.as_slice().chunks_exact(own.weight.len());
        Ok(Some(
            rows.map(|row| {
                let score = score(&own.weight, own.bias, row);
                match (score < own.threshold, own.scaled) {
                    (true, _) => 0.0,
                    (false, true) => 1.0 / (1.0 + (-score).exp()),
                    (false, false) => 1.0,
                }
            })
            .collect(),
        ))
    }

    fn factors_backward(
        &self,
        layer: usize,
        middle: &Tensor<2>,
        wave: &WaveInfo,
        d_factors: &[f32],
        _: bool,
    ) -> Result<Option<Tensor<2>>> {
        let Some((own, input)) = self.layers.get(&layer).filter(|(own, _)| own.scaled) else { return Ok(None) };
        let factors = self.factors(layer, middle, wave)?.unwrap_or_default();
        let d_scores: Vec<f32> = d_factors.iter().zip(factors).map(|(d, f)| d * f * (1.0 - f)).collect();
        Ok(Some(input.scores_backward(middle, &own.weight, &d_scores)))
    }
}

/// What enters feed-forward halves, and how much they change it.
struct Seen {
    inputs: BTreeMap<usize, SkipInput>,
    layers: BTreeMap<usize, (Vec<f32>, Vec<f64>)>,
}

impl Observer for Seen {
    fn needs(&self) -> Signals {
        Signals::STREAMS
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        let Some(input) = self.inputs.get(&output.layer) else { return Ok(()) };
        let read = input.read(output.read);
        let (before, after) = (HostView::new(output.input), HostView::new(output.output));
        let columns = output.input.dims()[1];
        let (inputs, targets) = self.layers.entry(output.layer).or_default();
        inputs.extend_from_slice(read.as_slice());
        for (before, after) in before.as_slice().chunks_exact(columns).zip(after.as_slice().chunks_exact(columns)) {
            let (mut added, mut own) = (0.0, 0.0);
            for (x, y) in before.iter().zip(after) {
                (added, own) = (added + f64::from(y - x).powi(2), own + f64::from(*x).powi(2));
            }
            targets.push(0.5 * (added.max(1e-30) / own.max(1e-30)).ln());
        }
        Ok(())
    }
}
