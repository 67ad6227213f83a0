//! Two sizes of a feed-forward half, and a router that says which of them a token needs.
//!
//! Source: Duo-LLM, arXiv 2410.10846. There a layer has a large and a small feed-forward network, trained together; in
//! an MoE layer of a trained model the two are its `big` best experts and its `small` best ones, none among them. For
//! every token and layer a linear score of what the router reads gives `p = sigmoid(score / temperature)`, the share of
//! the large one; the routing weights are `p w_big + (1 - p) w_small`. A loss keeps the mean of p over all layers and
//! tokens near a budget, `c (mean p - budget)^2`, whatever each layer takes. While it is trained the temperature falls,
//! and afterwards the choice is hard: large where the score is above 0.
//!
//! [`oracle`] tries all patterns of large and small for a sample, which the paper compares trained routers with.

mod file;
mod rule;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use moe_core::{Model, RoutingOverlay, RoutingRule, adapters::Depth, train::Parameters};
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, TrainingHooks, TuningMethod,
    model_weights::OwnWeights,
};
use rule::{Choice, DuoLayer, Shared};

/// Trains a choice between two numbers of experts per token, under a budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DuoTuning {
    /// Experts per token of the large choice; the model's own by default.
    pub big: Option<usize>,
    /// Experts per token of the small choice; 0 passes the layer.
    pub small: usize,
    /// Share of the large choice over all layers and tokens.
    pub budget: f64,
    /// Factor of the loss that keeps it.
    pub coefficient: f64,
    /// Temperature in the first step, and in step `steps` and after.
    pub temperatures: [f32; 2],
    /// Steps over which the temperature falls.
    pub steps: usize,
    /// The model's own weights that are trained as well.
    pub weights: OwnWeights,
}

impl Default for DuoTuning {
    fn default() -> Self {
        Self {
            big: None,
            small: 1,
            budget: 0.5,
            coefficient: 1.0,
            temperatures: [1.0, 0.05],
            steps: 200,
            weights: OwnWeights::default(),
        }
    }
}

/// The choice of all MoE layers of a model.
#[derive(Debug)]
pub struct Duo {
    shared: Arc<Shared>,
    layers: BTreeMap<usize, Arc<DuoLayer>>,
    method: DuoTuning,
}

impl Duo {
    /// Scores of zero but for a bias of 1: large, at first.
    ///
    /// # Errors
    /// [`Error::Input`] for numbers of experts that a layer does not have.
    pub fn new(model: &Model, method: &DuoTuning) -> Result<Self> {
        let big = method.big.unwrap_or(model.router().top_k());
        Self::with(model, method, big, &mut |_, hidden| {
            let mut values = vec![0.0; hidden + 1];
            values[hidden] = 1.0;
            Ok(values)
        })
    }

    fn with(
        model: &Model,
        method: &DuoTuning,
        big: usize,
        values: &mut dyn FnMut(&str, usize) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let (config, hidden) = (model.config(), model.config().hidden_size);
        let shared = Arc::new(Shared::new(method.budget, method.coefficient));
        let mut layers = BTreeMap::new();
        for (layer, moe) in (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?))) {
            let most = model.router().reachable(moe.num_experts());
            if method.small >= big || big > most {
                let expected = format!("small below big, and big at most {most}");
                let found = format!("{} and {big}", method.small);
                return Err(Error::input(format!("experts per token of layer {layer}"), found, expected));
            }
            let live = Live::new(name(layer), [1, hidden + 1], values(&name(layer), hidden)?, model.device())?;
            layers.insert(layer, Arc::new(DuoLayer::new(layer, big, method.small, live, shared.clone())));
        }
        if layers.is_empty() {
            return Err(Error::input("layers with routed experts", 0, "at least one"));
        }
        Ok(Self { shared, layers, method: method.clone() })
    }

    /// Chooses by `p` at this temperature from the next sweep on; without one, hard.
    pub fn set_temperature(&self, temperature: Option<f32>) {
        let choice = temperature.map_or(Choice::Hard, Choice::Soft);
        *self.shared.choice.write().unwrap_or_else(PoisonError::into_inner) = choice;
    }

    /// Puts the scores among what a set trains.
    ///
    /// # Errors
    /// [`Error::Input`] if they are there already.
    pub fn train_in(&self, set: &mut AdapterSet) -> Result<()> {
        for (&layer, rule) in &self.layers {
            set.bank_mut().insert(rule.live().clone())?;
            set.reach(Depth::FeedForward(layer));
        }
        set.add_listener(self.shared.clone());
        Ok(())
    }

    /// `model` with the choice. Its routing must not be changed otherwise.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model with an overlay of its routing.
    pub fn applied_to(&self, model: &Model) -> Result<Model> {
        if model.routing_overlay().is_some() {
            return Err(Error::Unsupported("a choice of sizes on a model whose routing is changed already".into()));
        }
        Ok(model.routed_by(Arc::new(Overlay(self.layers.clone())))?)
    }

    /// Mean of p over the layers and tokens of the wave that ran last.
    pub fn share(&self) -> f64 {
        self.shared.mean()
    }
}

fn name(layer: usize) -> String {
    format!("layers.{layer}.duo")
}

/// Routes a model by its choice.
struct Overlay(BTreeMap<usize, Arc<DuoLayer>>);

impl RoutingOverlay for Overlay {
    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.0.get(&layer).map(|rule| rule.clone() as _)
    }
}

impl DuoTuning {
    fn has_weights(&self) -> bool {
        self.weights != OwnWeights::default()
    }
}

impl TuningMethod for DuoTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if !(0.0..=1.0).contains(&self.budget) {
            return Err(Error::input("budget", self.budget, "a share in [0, 1]"));
        }
        if !(self.coefficient >= 0.0 && self.coefficient.is_finite()) {
            return Err(Error::input("coefficient", self.coefficient, "a finite number of 0 or more"));
        }
        if self.temperatures.iter().any(|t| !(*t > 0.0 && t.is_finite())) {
            return Err(Error::input("temperatures", format!("{:?}", self.temperatures), "finite numbers above 0"));
        }
        Duo::new(on.model, self)?.applied_to(on.model)?;
        if self.has_weights() { self.weights.check(on) } else { Ok(()) }
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let installed = match self.has_weights() {
            true => self.weights.install(on, set)?,
            false => Installed::default(),
        };
        let duo = Arc::new(Duo::new(on.model, self)?);
        duo.train_in(set)?;
        let model = Some(duo.applied_to(on.model)?);
        let artifacts = Artifacts { duo: Some(duo.clone()), ..installed.artifacts.clone() };
        Ok(Installed { model, hooks: Some(Box::new(duo)), artifacts, ..installed })
    }
}

impl TrainingHooks for Arc<Duo> {
    fn before_step(&mut self, step: usize, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        let [first, last] = self.method.temperatures;
        let along = ((step - 1) as f32 / self.method.steps.max(1) as f32).min(1.0);
        self.set_temperature(Some(first + (last - first) * along));
        Ok(())
    }
}

/// All patterns of `choices` over layers, each with its reward, the best first; of equals, the one that `cost` says is
/// cheapest. Exhaustive: `choices ^ layers` trials, for few layers.
///
/// # Errors
/// [`Error::Input`] for more than a million patterns, and whatever `reward` returns.
pub fn oracle(
    layers: usize,
    choices: usize,
    cost: impl Fn(&[usize]) -> f64,
    mut reward: impl FnMut(&[usize]) -> Result<f64>,
) -> Result<Vec<(Vec<usize>, f64)>> {
    let count = u32::try_from(layers).ok().and_then(|layers| choices.checked_pow(layers));
    let Some(count) = count.filter(|count| *count <= 1_000_000) else {
        return Err(Error::input("patterns", format!("{choices} ^ {layers}"), "at most a million"));
    };
    let mut all = Vec::with_capacity(count);
    for code in 0..count {
        let pattern: Vec<usize> = (0..layers as u32).map(|layer| code / choices.pow(layer) % choices).collect();
        let found = reward(&pattern)?;
        all.push((pattern, found));
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(cost(&a.0).total_cmp(&cost(&b.0))));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oracle_finds_the_best_of_all_patterns_and_the_cheapest_of_equals() {
        let value = |p: &[usize]| ((p[0] * 3 + p[1] * 5 + p[2] * 7) % 8) as f64;
        let found = oracle(3, 2, |p| p.iter().sum::<usize>() as f64, |p| Ok(value(p))).unwrap();
        assert_eq!(found.len(), 8);
        let best = found.iter().map(|(_, v)| *v).fold(f64::MIN, f64::max);
        assert_eq!(found[0].1, best);
        assert!(found.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        let equal = oracle(3, 3, |p| p.iter().sum::<usize>() as f64, |_| Ok(1.0)).unwrap();
        assert_eq!(equal[0].0, [0, 0, 0]);
        assert!(oracle(40, 2, |_| 0.0, |_| Ok(0.0)).unwrap_err().to_string().contains("2 ^ 40"));
    }
}
