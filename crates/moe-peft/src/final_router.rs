//! The last router, taught by routes that it could have taken.
//!
//! Source: "When Are Experts Misrouted?", arXiv 2605.07260, of which the abstract is known: a token's route is compared
//! with sampled routes of equal compute by the probability that they give to the token that follows in a right text;
//! only the last MoE layer's router is trained, and all else is frozen. The loss is a documented choice: with routes
//! `S_m`, sampled by Gumbel noise on the logits, and `u_m = log p(next | S_m)`,
//!
//! `L = mean_t [ fragile(t) sum_m softmax(u / sharpness)_m (- sum_{e in S_m} log p_e)
//!             + (1 - fragile(t)) keep KL(p_before || p) ]`
//!
//! with p the shares of the experts, and a token fragile if the model gives less than `fragile` to the next one. All
//! layers before the last run once per row to find the routes; the training sweeps end at the last layer, too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use moe_checkpoint::RoutingKind;
use moe_core::{
    Engine, EngineOptions, LayerChange, Model, RouteTrial,
    adapters::RouterAdapter,
    adaptive::SampledRoutes,
    data::Wave,
    trace::{LayerTrace, WaveInfo},
};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Installed, Result, Setting, SweepListener, TuningMethod, model_weights::OwnWeights};

/// Trains the last router toward the routes under which the next token is likelier.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinalRouterTuning {
    /// Routes that are sampled for every token, beside the router's own; 0 changes nothing.
    pub routes: usize,
    /// Factor on their Gumbel noise.
    pub temperature: f64,
    /// What differences of the log-probability are divided by; small: the best route alone counts.
    pub sharpness: f64,
    /// Tokens to which the model gives less than this probability are taught.
    pub fragile: f64,
    /// Weight of what keeps the routing of the others.
    pub keep: f64,
    /// Whether the cross-entropy of the next token teaches the router as well.
    pub cross_entropy: bool,
    /// Seed of the routes.
    pub seed: u64,
}

impl Default for FinalRouterTuning {
    fn default() -> Self {
        Self { routes: 16, temperature: 1.0, sharpness: 1.0, fragile: 0.5, keep: 0.1, cross_entropy: false, seed: 0 }
    }
}

/// How much better than the router's own route the best sampled one is, by how sure the model is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteGap {
    /// Tokens to which the model gives a probability of at least this,
    pub from: f64,
    /// and below this.
    pub to: f64,
    /// How many they are.
    pub tokens: usize,
    /// Mean of `max_m u_m - u_own`, in nats; 0 where no route is better.
    pub gap: f64,
}

/// What a router of a wave is taught: a distribution of the experts for every token, and how much it counts.
#[derive(Clone, Debug, Default)]
struct Targets {
    /// `[T, E]`.
    shares: Vec<f64>,
    /// `[T]`.
    weights: Vec<f64>,
}

/// Losses of the routes of a wave: of the router's own, and of sampled ones.
fn trials(model: &Model, wave: &Wave, method: &FinalRouterTuning) -> Result<Vec<RouteTrial>> {
    let mut changes = vec![LayerChange::default()];
    for route in 0..method.routes as u64 {
        let seed = method.seed.wrapping_mul(0x9E37_79B9).wrapping_add(route + 1);
        let routing = SampledRoutes { temperature: method.temperature, seed }.on(model)?;
        changes.push(LayerChange { experts: None, routing: Some(Arc::new(routing)) });
    }
    Ok(Engine::new(model, EngineOptions::default()).route_trials(wave, &changes)?)
}

/// The gaps between the best sampled routes of the last layer and the router's own, over the predicted tokens of
/// `waves`, in ten bins of the probability that the model gives to the next token: what a pruned model, say, has lost
/// by its routing.
///
/// # Errors
/// Those of [`Engine::route_trials`].
pub fn route_gaps(model: &Model, waves: &[Wave], method: &FinalRouterTuning) -> Result<Vec<RouteGap>> {
    let mut bins = [(0usize, 0.0f64); 10];
    for wave in waves {
        let found = trials(model, wave, method)?;
        let Some((own, others)) = found.split_first() else { continue };
        for (token, loss) in &own.losses {
            let best = others.iter().filter_map(|trial| trial.losses.get(token)).copied().fold(*loss, f64::min);
            let bin = &mut bins[((-loss).exp() * 10.0).min(9.0) as usize];
            *bin = (bin.0 + 1, bin.1 + loss - best);
        }
    }
    let gap = |(i, (tokens, sum)): (usize, (usize, f64))| RouteGap {
        from: i as f64 / 10.0,
        to: (i + 1) as f64 / 10.0,
        tokens,
        gap: sum / tokens.max(1) as f64,
    };
    Ok(bins.into_iter().enumerate().map(gap).collect())
}

impl FinalRouterTuning {
    /// What the router of the last layer is taught on a wave.
    fn targets(&self, model: &Model, wave: &Wave, experts: usize) -> Result<Targets> {
        if self.routes == 0 {
            return Ok(Targets::default());
        }
        let found = trials(model, wave, self)?;
        let Some(own) = found.first() else { return Ok(Targets::default()) };
        let tokens = own.logits.len() / experts.max(1);
        let mut targets = Targets { shares: Vec::with_capacity(tokens * experts), weights: vec![0.0; tokens] };
        let mut shares = Vec::new();
        for t in 0..tokens {
            let Some(loss) = own.losses.get(&t) else {
                targets.shares.extend(std::iter::repeat_n(0.0, experts));
                continue;
            };
            if (-loss).exp() >= self.fragile {
                model.router().shares(&own.logits[t * experts..(t + 1) * experts], &mut shares);
                targets.shares.extend_from_slice(&shares);
                targets.weights[t] = self.keep;
                continue;
            }
            // softmax over routes of -loss / sharpness
            let losses: Vec<f64> = found.iter().map(|trial| trial.losses.get(&t).copied().unwrap_or(*loss)).collect();
            let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
            let parts: Vec<f64> = losses.iter().map(|loss| ((least - loss) / self.sharpness).exp()).collect();
            let sum: f64 = parts.iter().sum();
            let mut row = vec![0.0; experts];
            for (trial, part) in found.iter().zip(parts) {
                let k = trial.top_k.max(1);
                for e in &trial.selected[t * k..(t + 1) * k] {
                    row[*e as usize] += part / sum / k as f64;
                }
            }
            targets.shares.extend(row);
            targets.weights[t] = own.top_k as f64;
        }
        Ok(targets)
    }

    fn weights(last: usize) -> OwnWeights {
        OwnWeights { layers: Some([last].into()), ..OwnWeights::router() }
    }
}

/// The last decoder layer and its experts.
fn last(model: &Model) -> Result<(usize, usize)> {
    let config = model.config();
    let last = config.layers.len().saturating_sub(1);
    match config.moe(last) {
        Some(moe) => Ok((last, moe.num_experts())),
        None => Err(Error::Unsupported("routes of the last layer of a model in which it has no experts".into())),
    }
}

impl TuningMethod for FinalRouterTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        for (field, value) in [("temperature", self.temperature), ("sharpness", self.sharpness)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::input(field, value, "a finite number above 0"));
            }
        }
        if !(0.0..=1.0).contains(&self.fragile) {
            return Err(Error::input("fragile", self.fragile, "a probability in [0, 1]"));
        }
        if !(self.keep >= 0.0 && self.keep.is_finite()) {
            return Err(Error::input("keep", self.keep, "a finite number of 0 or more"));
        }
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("routes of a model whose routing is changed already".into()));
        }
        if matches!(on.model.config().routing.kind, RoutingKind::SqrtSoftplus) {
            let what = "routes of a model whose scores are neither a softmax nor sigmoids";
            return Err(Error::Unsupported(what.into()));
        }
        SampledRoutes { temperature: self.temperature, seed: 0 }.on(on.model)?;
        Self::weights(last(on.model)?.0).check(on)
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        Self::weights(last(on.model)?.0).outline(on, set)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let (last, experts) = last(on.model)?;
        let installed = Self::weights(last).install(on, set)?;
        let mut targets = BTreeMap::new();
        for wave in on.waves {
            targets.insert(wave.id, self.targets(on.model, wave, experts)?);
        }
        let loss = Arc::new(RouteLoss {
            targets,
            alone: !self.cross_entropy,
            sigmoid: matches!(on.model.config().routing.kind, RoutingKind::Sigmoid { .. }),
            last: Mutex::default(),
        });
        set.add_router(last, loss.clone());
        set.add_listener(loss);
        Ok(installed)
    }
}

/// Cross-entropy of the shares of the experts to what each token is taught.
#[derive(Debug)]
struct RouteLoss {
    targets: BTreeMap<u64, Targets>,
    /// Whether it takes the place of the gradient of the objective.
    alone: bool,
    /// Whether scores are sigmoids.
    sigmoid: bool,
    last: Mutex<f64>,
}

impl RouteLoss {
    /// For each token that counts: its number, its weight, what it is taught, and its logits.
    fn rows<'a>(&'a self, trace: &'a LayerTrace<'_>) -> impl Iterator<Item = (usize, f64, &'a [f64], &'a [f32])> {
        let experts = trace.experts.max(1);
        let targets = self.targets.get(&trace.wave.id);
        let targets = targets.filter(|targets| targets.shares.len() == trace.logits.len());
        targets.into_iter().flat_map(move |targets| {
            let rows = targets.shares.chunks_exact(experts).zip(trace.logits.chunks_exact(experts));
            let counts = targets.weights.iter().zip(rows).enumerate();
            counts
                .filter(|(_, (weight, _))| **weight != 0.0)
                .map(|(t, (weight, (row, logits)))| (t, *weight, row, logits))
        })
    }
}

/// Share of each expert, and d log(score) / d logit of it: softmax, or sigmoids divided by their sum.
fn shares(logits: &[f32], sigmoid: bool) -> Vec<(f64, f64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let score = |z: &f32| match sigmoid {
        true => 1.0 / (1.0 + (-f64::from(*z)).exp()),
        false => f64::from(z - max).exp(),
    };
    let scores: Vec<f64> = logits.iter().map(score).collect();
    let sum: f64 = scores.iter().sum();
    scores.into_iter().map(|score| (score / sum, if sigmoid { 1.0 - score } else { 1.0 })).collect()
}

impl RouterAdapter for RouteLoss {
    fn routed(&self, trace: &LayerTrace<'_>) {
        let tokens = trace.wave.loss_tokens().max(1) as f64;
        let term = |(_, weight, row, logits): (usize, f64, &[f64], &[f32])| -> f64 {
            weight * {
                let divergence = |(q, (p, _)): (&f64, (f64, f64))| if *q > 0.0 { q * (q / p).ln() } else { 0.0 };
                row.iter().zip(shares(logits, self.sigmoid)).map(divergence).sum::<f64>()
            }
        };
        let loss = self.rows(trace).map(term).sum::<f64>() / tokens;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = loss;
    }

    fn add_gradient(&self, trace: &LayerTrace<'_>, d_logits: &mut [f32]) {
        if self.alone {
            d_logits.fill(0.0);
        }
        let experts = trace.experts.max(1);
        for (t, weight, row, logits) in self.rows(trace) {
            let total: f64 = row.iter().sum();
            let d = &mut d_logits[t * experts..(t + 1) * experts];
            for ((d, q), (p, slope)) in d.iter_mut().zip(row).zip(shares(logits, self.sigmoid)) {
                *d += (weight * slope * (total * p - q)) as f32;
            }
        }
    }
}

impl SweepListener for RouteLoss {
    fn begin_wave(&self, _: &WaveInfo) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = 0.0;
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        vec![("routes", *self.last.lock().unwrap_or_else(PoisonError::into_inner))]
    }
}

#[cfg(test)]
mod tests {
    use moe_core::trace::SequenceInfo;

    use super::*;

    #[test]
    fn the_gradient_matches_difference_quotients_and_takes_the_place_of_the_objectives() {
        let wave = WaveInfo {
            id: 3,
            tokens: 4,
            ids: Vec::new(),
            sequences: vec![SequenceInfo { tokens: 0..4, loss_tokens: 3 }],
        };
        let row = [0.1, 0.6, 0.3, 0.0, 0.0];
        let targets = Targets { shares: row.repeat(4), weights: vec![2.0, 0.1, 0.0, 1.0] };
        let logits: Vec<f32> = (0..20).map(|i| (i as f32 * 1.3).sin()).collect();
        for sigmoid in [false, true] {
            let targets = [(3, targets.clone())].into();
            check(&RouteLoss { targets, alone: true, sigmoid, last: Mutex::default() }, &logits, &wave);
        }
    }

    fn check(loss: &RouteLoss, logits: &[f32], wave: &WaveInfo) {
        let run = |logits: &[f32]| {
            let (selected, weights) = (vec![0; 4], vec![1.0; 4]);
            let trace = LayerTrace {
                layer: 1,
                wave,
                experts: 5,
                top_k: 1,
                logits,
                selected: &selected,
                weights: &weights,
                scale: 1.0,
                idle: &[],
            };
            loss.begin_wave(wave);
            loss.routed(&trace);
            let mut d = vec![7.0; 20];
            loss.add_gradient(&trace, &mut d);
            (loss.losses()[0].1, d)
        };
        let (_, d) = run(logits);
        for i in 0..20 {
            let at = |h: f32| {
                let mut moved = logits.to_vec();
                moved[i] += h;
                run(&moved).0 * 3.0
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((numeric - f64::from(d[i])).abs() < 1e-4, "{i}: {numeric} {}", d[i]);
        }
        assert!(d[10..15].iter().all(|d| *d == 0.0));
    }
}
