//! Routers that learn which experts are right for a token.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use moe_core::{
    Engine, EngineOptions, Model,
    adapters::RouterAdapter,
    adaptive::{Forced, ForcedWeights},
    data::Wave,
    host::HostView,
    trace::{LayerTrace, Observer, Signals, WaveInfo},
};

use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Installed, Result, Setting, SweepListener, TuningMethod, model_weights::OwnWeights};

/// Binary cross-entropy of the sigmoid of every router logit to whether the expert is right for the token (DriftMoE,
/// arXiv 2507.18464): several experts may be, or none. Mean over tokens and experts, times a coefficient, summed over
/// the layers that have targets.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterTargets {
    /// Factor of the loss; 0 or more.
    pub coefficient: f64,
    /// Whether each expert is right for each token `[T, E]`, by wave id and decoder layer.
    pub targets: Arc<BTreeMap<(u64, usize), Vec<bool>>>,
}

impl RouterTargets {
    /// Targets of a layer by trial: an expert is right for a token if the model, with all of that layer's tokens sent
    /// to this expert alone, predicts the next token. One sweep for every expert; tokens without a next one have no
    /// right expert.
    ///
    /// # Errors
    /// [`Error::Input`] for a layer without experts, and whatever stops the model.
    pub fn by_trial(model: &Model, layer: usize, waves: &[Wave], coefficient: f64) -> Result<Self> {
        let Some(moe) = model.config().moe(layer) else {
            return Err(Error::input("layer of the targets", layer, "one with routed experts"));
        };
        let experts = moe.num_experts();
        let mut targets: BTreeMap<(u64, usize), Vec<bool>> = BTreeMap::new();
        for expert in 0..experts {
            let weights = ForcedWeights::Equal;
            let forced =
                Forced { experts: vec![vec![expert as u32]], label: Some(0), weights, labels: BTreeMap::new() };
            let mut routing = forced.on(model)?;
            routing.rules.retain(|of, _| *of == layer);
            let under = model.routed_by(Arc::new(routing))?;
            let engine = Engine::new(&under, EngineOptions::default());
            for wave in waves {
                let mut seen = Predicted::default();
                engine.run(wave, &mut seen)?;
                let next = wave
                    .sequences
                    .iter()
                    .flat_map(|sequence| (1..=sequence.ids.len()).map(|t| sequence.counts(t).then(|| sequence.ids[t])));
                let row = targets.entry((wave.id, layer)).or_insert_with(|| vec![false; wave.tokens() * experts]);
                for (t, next) in next.enumerate() {
                    row[t * experts + expert] = next.is_some() && seen.0.get(t).copied() == next;
                }
            }
        }
        Ok(Self { coefficient, targets: Arc::new(targets) })
    }
}

/// Trains a router on which experts are right, found [by trial](RouterTargets::by_trial) on the rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterTargetTuning {
    /// The layer; the last one with experts by default.
    pub layer: Option<usize>,
    /// Factor of the loss.
    pub coefficient: f64,
    /// The weights that are trained; the layer's router by default.
    pub weights: Option<OwnWeights>,
}

impl Default for RouterTargetTuning {
    fn default() -> Self {
        Self { layer: None, coefficient: 1.0, weights: None }
    }
}

impl RouterTargetTuning {
    fn layer(&self, model: &Model) -> Result<usize> {
        let config = model.config();
        let last = (0..config.layers.len()).rev().find(|layer| config.moe(*layer).is_some());
        let layer = self.layer.or(last).filter(|layer| config.moe(*layer).is_some());
        let found = self.layer.map_or("none".to_string(), |layer| layer.to_string());
        layer.ok_or_else(|| Error::input("layer of the targets", found, "one with routed experts"))
    }

    fn weights(&self, layer: usize) -> OwnWeights {
        let router = || OwnWeights { layers: Some([layer].into()), ..OwnWeights::router() };
        self.weights.clone().unwrap_or_else(router)
    }
}

impl TuningMethod for RouterTargetTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        let none = RouterTargets { coefficient: self.coefficient, targets: Arc::default() };
        none.check(on)?;
        self.weights(self.layer(on.model)?).check(on)
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.weights(self.layer(on.model)?).outline(on, set)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let layer = self.layer(on.model)?;
        let installed = self.weights(layer).install(on, set)?;
        let targets = RouterTargets::by_trial(on.model, layer, on.waves, self.coefficient)?;
        Ok(installed.and(targets.install(on, set)?))
    }
}

/// The likeliest next token after every token of a wave.
#[derive(Default)]
struct Predicted(Vec<u32>);

impl Observer for Predicted {
    fn needs(&self) -> Signals {
        Signals { logits: true, ..Signals::NONE }
    }

    fn logits(&mut self, _: usize, logits: &HostView, vocab: usize) -> moe_core::Result<()> {
        let best = |row: &[f32]| (0..row.len()).fold(0, |b, i| if row[i] > row[b] { i } else { b }) as u32;
        self.0.extend(logits.as_slice().chunks_exact(vocab).map(best));
        Ok(())
    }
}

impl TuningMethod for RouterTargets {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if !(self.coefficient >= 0.0 && self.coefficient.is_finite()) {
            return Err(Error::input("coefficient", self.coefficient, "a finite number of 0 or more"));
        }
        let layers: BTreeSet<usize> = self.targets.keys().map(|(_, layer)| *layer).collect();
        for layer in layers {
            let Some(moe) = on.model.config().moe(layer) else {
                return Err(Error::input("layer of the targets", layer, "one with routed experts"));
            };
            for wave in on.waves {
                let expected = wave.tokens() * moe.num_experts();
                let found = self.targets.get(&(wave.id, layer)).map_or(0, Vec::len);
                if found != expected {
                    let what = format!("targets of wave {} in layer {layer}", wave.id);
                    return Err(Error::input(what, found, format!("{expected}: tokens times experts")));
                }
            }
        }
        Ok(())
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let layers: BTreeSet<usize> = self.targets.keys().map(|(_, layer)| *layer).collect();
        let loss = Arc::new(TargetLoss { of: self.clone(), last: Mutex::default() });
        layers.into_iter().for_each(|layer| set.add_router(layer, loss.clone()));
        set.add_listener(loss);
        Ok(Installed::default())
    }
}

#[derive(Debug)]
struct TargetLoss {
    of: RouterTargets,
    last: Mutex<f64>,
}

impl RouterAdapter for TargetLoss {
    fn routed(&self, trace: &LayerTrace<'_>) {
        let Some(targets) = self.of.targets.get(&(trace.wave.id, trace.layer)) else { return };
        let n = trace.logits.len().max(1) as f64;
        let term = |(z, right): (&f32, &bool)| {
            let z = f64::from(*z);
            // softplus(z) - y z
            z.max(0.0) + (-z.abs()).exp().ln_1p() - if *right { z } else { 0.0 }
        };
        let loss = trace.logits.iter().zip(targets).map(term).sum::<f64>() / n;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) += self.of.coefficient * loss;
    }

    fn add_gradient(&self, trace: &LayerTrace<'_>, d_logits: &mut [f32]) {
        let Some(targets) = self.of.targets.get(&(trace.wave.id, trace.layer)) else { return };
        let factor = self.of.coefficient * trace.wave.loss_tokens() as f64 / trace.logits.len().max(1) as f64;
        for ((d, z), right) in d_logits.iter_mut().zip(trace.logits).zip(targets) {
            let p = 1.0 / (1.0 + (-f64::from(*z)).exp());
            *d += (factor * (p - f64::from(u8::from(*right)))) as f32;
        }
    }
}

impl SweepListener for TargetLoss {
    fn begin_wave(&self, _: &WaveInfo) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = 0.0;
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        vec![("router_targets", *self.last.lock().unwrap_or_else(PoisonError::into_inner))]
    }
}

#[cfg(test)]
mod tests {
    use moe_core::trace::SequenceInfo;

    use super::*;

    #[test]
    fn the_gradient_matches_difference_quotients_and_falls_to_the_targets() {
        let wave = WaveInfo {
            id: 5,
            tokens: 3,
            ids: Vec::new(),
            sequences: vec![SequenceInfo { tokens: 0..3, loss_tokens: 2 }],
        };
        let right: Vec<bool> = (0..12).map(|i| i % 3 == 0).collect();
        let of = RouterTargets { coefficient: 0.8, targets: Arc::new([((5, 1), right.clone())].into()) };
        let loss = TargetLoss { of, last: Mutex::default() };
        let mut logits: Vec<f32> = (0..12).map(|i| (i as f32 * 1.9).sin() * 2.0).collect();
        let run = |logits: &[f32]| {
            let (selected, weights) = (vec![0; 3], vec![1.0; 3]);
            let (selected, weights, wave) = (&selected, &weights, &wave);
            let trace =
                LayerTrace { layer: 1, wave, experts: 4, top_k: 1, logits, selected, weights, scale: 1.0, idle: &[] };
            loss.begin_wave(wave);
            loss.routed(&trace);
            let mut d = vec![0.0; 12];
            loss.add_gradient(&trace, &mut d);
            (loss.losses()[0].1, d)
        };
        let (_, d) = run(&logits);
        for i in 0..12 {
            let at = |h: f32| {
                let mut moved = logits.clone();
                moved[i] += h;
                run(&moved).0 * 2.0
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((numeric - f64::from(d[i])).abs() < 1e-4, "{i}");
        }
        for _ in 0..4000 {
            let (_, d) = run(&logits);
            logits.iter_mut().zip(d).for_each(|(z, d)| *z -= 2.0 * d);
        }
        assert!(logits.iter().zip(right).all(|(z, right)| (*z > 0.0) == right));
    }
}
