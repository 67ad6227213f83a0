//! Balance without a loss: a bias on the selection of experts that follows their load.
//!
//! Source: arXiv 2408.15664, as Megatron-LM has it. Experts are selected by `score + b_e`, and weighed by the score
//! alone. After every optimizer step `b_e += speed * sign(mean load - load_e)`, with the loads of all tokens of the
//! step; no gradient trains `b`. Near balance the sign oscillates, so that loads stay within about a tenth of their
//! mean however long it goes on: [`LossFree::dead_band`] leaves experts alone that are near enough.
//!
//! The bias ends in the tensor that a family has for it, or in `run_time.json` beside the model.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moe_core::{
    Model, RouterTokens, RoutingOverlay, RoutingRule, RuleGradients,
    adapters::RouterAdapter,
    adaptive::{RoutingConfig, SelectionBias},
    router::Routed,
    trace::LayerTrace,
    train::{Parameters, StateArray, TaskState},
};
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Artifacts, Error, Installed, Result, Setting, TrainingHooks, TuningMethod, model_weights::OwnWeights,
};

/// Trains weights of a model while a bias balances the load of its experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossFree {
    /// What a step adds to or takes from a bias; above 0.
    pub speed: f32,
    /// Relative distance from the mean load within which a bias stays; 0 or more.
    pub dead_band: f64,
    /// The weights that are trained.
    pub weights: OwnWeights,
}

impl Default for LossFree {
    fn default() -> Self {
        let weights = OwnWeights { experts: true, router: true, ..OwnWeights::default() };
        Self { speed: 1e-3, dead_band: 0.0, weights }
    }
}

/// The biases of all MoE layers.
#[derive(Debug)]
pub struct BalanceBias {
    layers: BTreeMap<usize, Arc<BiasLayer>>,
    speed: f32,
    dead_band: f64,
}

#[derive(Debug)]
struct BiasLayer {
    state: Mutex<BiasState>,
}

#[derive(Debug)]
struct BiasState {
    bias: Vec<f32>,
    /// Tokens of each expert since the last step.
    load: Vec<f64>,
}

impl BiasLayer {
    fn lock(&self) -> MutexGuard<'_, BiasState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RoutingRule for BiasLayer {
    fn route(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Routed> {
        let mut bias = self.lock().bias.clone();
        if bias.iter().all(|bias| *bias == 0.0) {
            return Ok(tokens.router.route(tokens.logits, tokens.experts, tokens.bias));
        }
        if let Some(own) = tokens.bias {
            bias.iter_mut().zip(own).for_each(|(bias, own)| *bias += own);
        }
        Ok(tokens.router.route(tokens.logits, tokens.experts, Some(&bias)))
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> moe_core::Result<RuleGradients> {
        Ok(tokens.router.backward(tokens.logits, routed, d_weights).into())
    }
}

impl RouterAdapter for BiasLayer {
    fn routed(&self, trace: &LayerTrace<'_>) {
        let mut state = self.lock();
        for (&e, _) in trace.selected.iter().zip(trace.weights).filter(|(_, w)| **w != 0.0) {
            state.load[e as usize] += 1.0;
        }
    }
}

impl BalanceBias {
    fn new(model: &Model, method: &LossFree) -> Self {
        let config = model.config();
        let layers = (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?.num_experts())));
        let new = |experts: usize| {
            let state = BiasState { bias: vec![0.0; experts], load: vec![0.0; experts] };
            Arc::new(BiasLayer { state: Mutex::new(state) })
        };
        let layers = layers.map(|(layer, experts)| (layer, new(experts))).collect();
        Self { layers, speed: method.speed, dead_band: method.dead_band }
    }

    /// Moves the biases by the loads since the last step.
    pub fn step(&self) {
        for layer in self.layers.values() {
            let mut state = layer.lock();
            let BiasState { bias, load } = &mut *state;
            let mean = load.iter().sum::<f64>() / load.len().max(1) as f64;
            for (bias, load) in bias.iter_mut().zip(load.iter_mut()) {
                let difference = mean - std::mem::take(load);
                if mean > 0.0 && difference.abs() > self.dead_band * mean {
                    *bias += self.speed * difference.signum() as f32 * f32::from(u8::from(difference != 0.0));
                }
            }
        }
    }

    /// The biases as a rule of routing.
    pub fn routing(&self) -> RoutingConfig {
        let bias = self.layers.values().map(|layer| layer.lock().bias.clone()).collect();
        RoutingConfig::Bias(SelectionBias { bias })
    }
}

/// Routes a model under its biases.
struct Overlay(BTreeMap<usize, Arc<BiasLayer>>);

impl RoutingOverlay for Overlay {
    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.0.get(&layer).map(|rule| rule.clone() as _)
    }
}

impl TuningMethod for LossFree {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if !(self.speed > 0.0 && self.speed.is_finite()) {
            return Err(Error::input("speed", self.speed, "a finite number above 0"));
        }
        if !(self.dead_band >= 0.0 && self.dead_band.is_finite()) {
            return Err(Error::input("dead_band", self.dead_band, "a finite number of 0 or more"));
        }
        on.model.router().check_bias()?;
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("a balancing bias on a model whose routing is changed already".into()));
        }
        self.weights.check(on)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let installed = self.weights.install(on, set)?;
        let bias = Arc::new(BalanceBias::new(on.model, self));
        bias.layers.iter().for_each(|(layer, rule)| set.add_router(*layer, rule.clone()));
        let model = Some(on.model.routed_by(Arc::new(Overlay(bias.layers.clone())))?);
        let artifacts = Artifacts { balance_bias: Some(bias.clone()), ..installed.artifacts.clone() };
        Ok(Installed { model, hooks: Some(Box::new(bias)), artifacts, ..installed })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        self.weights.outline(on, set)
    }
}

impl TrainingHooks for Arc<BalanceBias> {
    fn after_step(&mut self, _: usize, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        self.step();
        Ok(())
    }

    fn state_save(&self) -> Result<TaskState> {
        let mut state = TaskState::default();
        for (layer, rule) in &self.layers {
            let values = rule.lock().bias.clone();
            state.arrays.insert(format!("layers.{layer}.bias"), StateArray { shape: vec![values.len()], values });
        }
        Ok(state)
    }

    fn state_load(&mut self, mut state: TaskState, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        for (layer, rule) in &self.layers {
            let name = format!("layers.{layer}.bias");
            let mut own = rule.lock();
            match state.arrays.remove(&name) {
                Some(array) if array.values.len() == own.bias.len() => own.bias = array.values,
                _ => return Err(Error::input("saved state of biases", "another", format!("one with {name}"))),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Routing, RoutingKind};
    use moe_core::{router::Router, trace::WaveInfo};

    use super::*;

    fn layer(experts: usize) -> BalanceBias {
        let state = BiasState { bias: vec![0.0; experts], load: vec![0.0; experts] };
        let layers = [(0, Arc::new(BiasLayer { state: Mutex::new(state) }))].into();
        BalanceBias { layers, speed: 1e-3, dead_band: 0.0 }
    }

    #[test]
    fn a_step_moves_every_bias_by_the_speed_or_not_at_all() {
        let bias = layer(3);
        bias.layers[&0].lock().load = vec![5.0, 1.0, 3.0];
        bias.step();
        assert_eq!(bias.layers[&0].lock().bias, [-1e-3, 1e-3, 0.0]);
        bias.step();
        assert_eq!(bias.layers[&0].lock().bias, [-1e-3, 1e-3, 0.0], "nothing was routed");
        let patient = BalanceBias { dead_band: 0.5, ..layer(3) };
        patient.layers[&0].lock().load = vec![4.0, 2.0, 3.0];
        patient.step();
        assert_eq!(patient.layers[&0].lock().bias, [0.0; 3]);
    }

    #[test]
    fn the_load_of_two_experts_becomes_even_and_weights_stay_unbiased() {
        let kind = RoutingKind::Sigmoid { renormalize: false, correction_bias: false, groups: None };
        let router = Router::new(&Routing::new(1, kind)).unwrap();
        let bias = layer(2);
        let wave = WaveInfo { id: 0, tokens: 500, ids: Vec::new(), sequences: Vec::new() };
        // expert 0 is mostly ahead
        let logits: Vec<f32> =
            (0..500).flat_map(|t| [0.5 + (t as f32 * 1.37).sin(), (t as f32 * 2.11).cos()]).collect();
        let tokens = RouterTokens {
            layer: 0,
            experts: 2,
            logits: &logits,
            bias: None,
            input: None,
            router: &router,
            table: None,
            wave: &wave,
        };
        let share = |routed: &Routed| routed.selected.iter().filter(|e| **e == 0).count() as f64 / 500.0;
        let before = share(&bias.layers[&0].route(&tokens).unwrap());
        for _ in 0..400 {
            let routed = bias.layers[&0].route(&tokens).unwrap();
            let (selected, weights) = (&routed.selected, &routed.weights);
            let trace = LayerTrace {
                layer: 0,
                wave: &wave,
                experts: 2,
                top_k: 1,
                logits: &logits,
                selected,
                weights,
                scale: 1.0,
                idle: &[],
            };
            bias.layers[&0].routed(&trace);
            bias.step();
        }
        let routed = bias.layers[&0].route(&tokens).unwrap();
        assert!(before > 0.6 && (share(&routed) - 0.5).abs() < 0.02, "{before} {}", share(&routed));
        for (t, (e, w)) in routed.selected.iter().zip(&routed.weights).enumerate() {
            let z = logits[2 * t + *e as usize];
            assert!((w - 1.0 / (1.0 + (-z).exp())).abs() < 1e-6);
        }
    }
}
