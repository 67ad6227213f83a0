//! The choice in one layer, its gradient, and the budget of all layers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use moe_core::{
    RouterTokens, RoutingRule, RuleGradients,
    host::{self, HostView},
    router::Routed,
    trace::WaveInfo,
};

use crate::{Live, SweepListener};

/// How the large or the small choice is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Choice {
    /// Mixed by the sigmoid of the score over this temperature.
    Soft(f32),
    /// One or the other.
    Hard,
}

/// What all layers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub choice: RwLock<Choice>,
    budget: f64,
    coefficient: f64,
    /// Sum of p and tokens of every layer in the wave that ran last.
    layers: Mutex<BTreeMap<usize, (f64, usize)>>,
}

impl Shared {
    pub fn new(budget: f64, coefficient: f64) -> Self {
        Self { choice: RwLock::new(Choice::Hard), budget, coefficient, layers: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, (f64, usize)>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mean of p over all layers and tokens, and their number.
    fn over_all(&self) -> (f64, f64) {
        let (sum, count) = self.lock().values().fold((0.0, 0), |(s, n), (p, tokens)| (s + p, n + tokens));
        (sum / f64::from(count.max(1) as u32), count as f64)
    }

    pub fn mean(&self) -> f64 {
        self.over_all().0
    }
}

impl SweepListener for Shared {
    fn begin_wave(&self, _: &WaveInfo) {
        self.lock().clear();
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        vec![("duo_budget", self.coefficient * (self.mean() - self.budget).powi(2))]
    }
}

/// The rule of one layer.
#[derive(Debug)]
pub(super) struct DuoLayer {
    layer: usize,
    big: usize,
    small: usize,
    /// Weight and bias of the score `[1, H + 1]`.
    live: Arc<Live>,
    shared: Arc<Shared>,
}

impl DuoLayer {
    pub fn new(layer: usize, big: usize, small: usize, live: Arc<Live>, shared: Arc<Shared>) -> Self {
        Self { layer, big, small, live, shared }
    }

    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    pub fn sizes(&self) -> (usize, usize) {
        (self.big, self.small)
    }

    /// Share of the large choice of every token.
    fn shares(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Vec<f32>> {
        let choice = *self.shared.choice.read().unwrap_or_else(PoisonError::into_inner);
        let (x, values) = (HostView::new(tokens.read()?), self.live.to_vec());
        let (weight, bias) = values.split_at(values.len() - 1);
        let share = |row: &[f32]| {
            let score = row.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>() + bias[0];
            match choice {
                Choice::Hard => f32::from(u8::from(score > 0.0)),
                Choice::Soft(temperature) => 1.0 / (1.0 + (-score / temperature).exp()),
            }
        };
        Ok(x.as_slice().chunks_exact(weight.len()).map(share).collect())
    }

    /// Where tokens go, with the weights of the large choice and of the small one, in the same slots.
    fn both(&self, tokens: &RouterTokens<'_>) -> (Routed, Routed) {
        let big = tokens.router.with_top_k(self.big).route(tokens.logits, tokens.experts, tokens.bias);
        let mut small = big.clone();
        let (k, few) = (big.top_k.max(1), self.small);
        tokens.router.weigh_members(tokens.logits, &mut small, |slot| slot % k < few);
        (big, small)
    }
}

impl RoutingRule for DuoLayer {
    fn route(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Routed> {
        let shares = self.shares(tokens)?;
        let sum = shares.iter().map(|p| f64::from(*p)).sum::<f64>();
        self.shared.lock().insert(self.layer, (sum, shares.len()));
        let (mut big, small) = self.both(tokens);
        let k = big.top_k.max(1);
        for (slot, (weight, few)) in big.weights.iter_mut().zip(&small.weights).enumerate() {
            let p = shares[slot / k];
            // either one to the bit
            *weight = match p {
                1.0 => *weight,
                0.0 => *few,
                p => p * *weight + (1.0 - p) * few,
            };
        }
        Ok(big)
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        _: &Routed,
        d_weights: &[f32],
        parameters: bool,
    ) -> moe_core::Result<RuleGradients> {
        let shares = self.shares(tokens)?;
        let (big, small) = self.both(tokens);
        let k = big.top_k.max(1);
        let of = |large: bool| -> Vec<f32> {
            let share = |slot: usize| if large { shares[slot / k] } else { 1.0 - shares[slot / k] };
            d_weights.iter().enumerate().map(|(slot, d)| d * share(slot)).collect()
        };
        let mut logits = tokens.router.members_backward(tokens.logits, &big, &of(true));
        let few = tokens.router.members_backward(tokens.logits, &small, &of(false));
        logits.iter_mut().zip(few).for_each(|(sum, d)| *sum += d);
        let choice = *self.shared.choice.read().unwrap_or_else(PoisonError::into_inner);
        let Choice::Soft(temperature) = choice else { return Ok(logits.into()) };
        let (mean, count) = self.shared.over_all();
        let budget = match parameters {
            true => 2.0 * self.shared.coefficient * (mean - self.shared.budget) / count.max(1.0),
            false => 0.0,
        } * tokens.wave.loss_tokens() as f64;
        let d_scores: Vec<f32> = (0..shares.len())
            .map(|t| {
                let slots = t * k..(t + 1) * k;
                let through: f32 = slots.map(|slot| d_weights[slot] * (big.weights[slot] - small.weights[slot])).sum();
                (through + budget as f32) * shares[t] * (1.0 - shares[t]) / temperature
            })
            .collect();
        let x = tokens.read()?;
        let [count, hidden] = x.dims();
        let values = self.live.to_vec();
        if parameters && self.live.is_trained() {
            let view = HostView::new(x);
            self.live.add_gradient(|sum| {
                for (row, d) in view.as_slice().chunks_exact(hidden).zip(&d_scores) {
                    sum[..hidden].iter_mut().zip(row).for_each(|(sum, x)| *sum += d * x);
                    sum[hidden] += d;
                }
            });
        }
        let input = d_scores.iter().flat_map(|d| values[..hidden].iter().map(move |w| d * w)).collect();
        Ok(RuleGradients { logits, input: Some(host::from_vec(input, [count, hidden], &x.device())) })
    }
}
