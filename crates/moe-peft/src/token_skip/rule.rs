//! Which tokens skip, in training and afterwards, and the gradients of their scores.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;
use moe_core::{
    depth::{DepthRule, SkipInput},
    trace::WaveInfo,
};

use super::TokenSkipTuning;
use crate::{Live, SweepListener};

/// The rule of all layers.
#[derive(Debug)]
pub(super) struct SkipRule {
    /// Weight and bias of the score `[1, H + 1]` of every layer, and what it reads.
    layers: BTreeMap<usize, (Arc<Live>, SkipInput)>,
    run: f64,
    coefficient: f64,
    scaled: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether tokens are chosen among those of their sequence.
    training: bool,
    /// Tokens of waves that always run, by the wave's id.
    protected: BTreeMap<u64, Vec<bool>>,
    /// Of the wave that ran last: tokens that went through, of how many, and the cross-entropy, by layer.
    seen: BTreeMap<usize, (usize, usize, f64)>,
}

/// What was decided of the tokens of a layer.
struct Decided {
    /// `sigmoid(score)` of every token.
    r: Vec<f32>,
    /// Whether it goes through.
    runs: Vec<bool>,
}

impl SkipRule {
    pub fn new(layers: BTreeMap<usize, (Arc<Live>, SkipInput)>, method: &TokenSkipTuning) -> Self {
        let TokenSkipTuning { run, coefficient, scaled, .. } = *method;
        Self { layers, run, coefficient, scaled, state: Mutex::default() }
    }

    pub fn layers(&self) -> impl Iterator<Item = (&usize, &(Arc<Live>, SkipInput))> {
        self.layers.iter()
    }

    pub fn is_scaled(&self) -> bool {
        self.scaled
    }

    pub fn protect(&self, tokens: BTreeMap<u64, Vec<bool>>) {
        self.lock().protected = tokens;
    }

    /// Share of the tokens of the wave that ran last that went through.
    pub fn share(&self) -> f64 {
        let state = self.lock();
        let (ran, all) = state.seen.values().fold((0, 0), |(ran, all), (r, n, _)| (ran + r, all + n));
        ran as f64 / f64::max(all as f64, 1.0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn decide(&self, (live, input): &(Arc<Live>, SkipInput), middle: &Tensor<2>, wave: &WaveInfo) -> Decided {
        let (x, values) = (input.read(middle), live.to_vec());
        let (weight, bias) = values.split_at(values.len() - 1);
        let score = |row: &[f32]| row.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>() + bias[0];
        let scores: Vec<f32> = x.as_slice().chunks_exact(weight.len()).map(score).collect();
        let r: Vec<f32> = scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect();
        let state = self.lock();
        if !state.training {
            return Decided { runs: scores.iter().map(|score| *score >= 0.0).collect(), r };
        }
        let protected = state.protected.get(&wave.id).filter(|tokens| tokens.len() == scores.len());
        let mut runs = vec![false; scores.len()];
        for sequence in &wave.sequences {
            let count = (self.run * sequence.tokens.len() as f64).ceil() as usize;
            let mut order: Vec<usize> = sequence.tokens.clone().collect();
            let first = |t: usize| protected.is_some_and(|tokens| tokens[t]);
            order.sort_by(|&a, &b| first(b).cmp(&first(a)).then(scores[b].total_cmp(&scores[a])).then(a.cmp(&b)));
            let count = count.max(order.iter().filter(|t| first(**t)).count());
            order.into_iter().take(count).for_each(|t| runs[t] = true);
        }
        Decided { r, runs }
    }
}

impl DepthRule for SkipRule {
    fn is_by_token(&self) -> bool {
        true
    }

    fn factors(&self, layer: usize, middle: &Tensor<2>, wave: &WaveInfo) -> moe_core::Result<Option<Vec<f32>>> {
        let Some(own) = self.layers.get(&layer) else { return Ok(None) };
        let Decided { r, runs } = self.decide(own, middle, wave);
        let log_loss = |(r, runs): (&f32, &bool)| -f64::from(if *runs { *r } else { 1.0 - r }).max(1e-30).ln();
        let loss = r.iter().zip(&runs).map(log_loss).sum::<f64>() / r.len().max(1) as f64;
        self.lock().seen.insert(layer, (runs.iter().filter(|runs| **runs).count(), runs.len(), loss));
        let factor = |(r, runs): (f32, bool)| match (runs, self.scaled) {
            (false, _) => 0.0,
            (true, true) => r,
            (true, false) => 1.0,
        };
        Ok(Some(r.into_iter().zip(runs).map(factor).collect()))
    }

    fn factors_backward(
        &self,
        layer: usize,
        middle: &Tensor<2>,
        wave: &WaveInfo,
        d_factors: &[f32],
        parameters: bool,
    ) -> moe_core::Result<Option<Tensor<2>>> {
        let Some(own @ (live, input)) = self.layers.get(&layer) else { return Ok(None) };
        let Decided { r, runs } = self.decide(own, middle, wave);
        // the mean over tokens and layers, beside the mean of the objective
        let share = self.coefficient * wave.loss_tokens() as f64 / (r.len() * self.layers.len()).max(1) as f64;
        let share = if parameters { share as f32 } else { 0.0 };
        let d_scores: Vec<f32> = (0..r.len())
            .map(|t| {
                // without the factor, the gradient of a mask that were the sigmoid
                let through = if runs[t] || !self.scaled { d_factors[t] } else { 0.0 };
                through * r[t] * (1.0 - r[t]) + share * (r[t] - f32::from(u8::from(runs[t])))
            })
            .collect();
        let values = live.to_vec();
        let hidden = values.len() - 1;
        if parameters && live.is_trained() {
            let x = input.read(middle);
            live.add_gradient(|sum| {
                for (row, d) in x.as_slice().chunks_exact(hidden).zip(&d_scores) {
                    sum[..hidden].iter_mut().zip(row).for_each(|(sum, x)| *sum += d * x);
                    sum[hidden] += d;
                }
            });
        }
        Ok(Some(input.scores_backward(middle, &values[..hidden], &d_scores)))
    }
}

impl SweepListener for SkipRule {
    fn begin_wave(&self, _: &WaveInfo) {
        self.lock().seen.clear();
    }

    fn training(&self, step: Option<usize>) {
        self.lock().training = step.is_some();
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        let state = self.lock();
        let sum: f64 = state.seen.values().map(|(_, _, loss)| loss).sum();
        vec![("token_skip", self.coefficient * sum / state.seen.len().max(1) as f64)]
    }
}
