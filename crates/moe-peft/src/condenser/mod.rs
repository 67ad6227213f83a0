//! Condenser experts: routing made more uneven by a bias, and a few experts that every token passes.
//!
//! Source: "Preserving Long-Tailed Expert Information in Mixture-of-Experts Tuning", arXiv 2604.23036, and its code
//! HectorHHZ/ExpertCondenser. In an MoE layer with logits `z [E]` of a token, a bias `b [E]` that no gradient trains,
//! and condensers C:
//!
//! 1. `p = softmax(z + b)` over all experts: the bias changes weights as well as the choice.
//! 2. [`CondenserMode::Additive`], the code: the k experts of the largest p, and then C, k + r in all. An expert that
//!    is in both counts twice: it runs once, with twice its weight. [`CondenserMode::Budget`], the paper's equation 2:
//!    the k - r largest outside C, and then C.
//! 3. Weights are p; where the model normalizes them, divided by their sum over the whole list (twice what counts
//!    twice); times the model's scale.
//!
//! After each optimizer step, `b_e += speed` where the expert's use `u_e = sum_t p_te` over all tokens of the step is
//! above the mean of the layer, `b_e -= speed` where it is below: busy experts gain. Phase one learns the bias without
//! condensers; then [`Condensers::select`] makes the r most starved experts of each layer condensers, once, and phase
//! two trains on with a smaller speed.
//!
//! Use is taken from the forward pass of sweeps that train, once per wave, and the bias changes only in
//! [`Condensers::step`], so that nothing that is computed again sees another bias. Bias, use and condensers are saved
//! [beside a checkpoint](Condensers::save); a stock runtime that ignores them runs another model.
//!
//! Chosen where the sources are silent or look mistaken: condensers are existing routed experts, as in the code; with
//! groups of experts, groups are ranked by biased scores and limit the choice, while p stays the softmax over all
//! experts, so that a model without bias and condensers is the stock model and a condenser outside the chosen groups
//! has a weight. Rules other than a softmax have no place for a bias inside it and are refused.

mod file;
mod rule;
mod select;
mod tuning;

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use moe_checkpoint::{ModelConfig, RoutingKind};
use moe_core::{
    Model, RoutingOverlay, RoutingRule,
    train::{Parameters, StateArray, TaskState},
};
use serde::{Deserialize, Serialize};

use rule::LayerRule;
pub use select::{CondenserCounts, Depths, LayerScore, Starved, gini};
pub use tuning::CondenserTuning;

use crate::{AdapterSet, Error, Result, TrainingHooks};

/// How condensers join the experts of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CondenserMode {
    /// Beside the k best experts.
    #[default]
    Additive,
    /// In place of the last r of them: as many experts per token as before.
    Budget,
}

/// What the use of an expert is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Center {
    /// The mean over the experts of the layer.
    #[default]
    Mean,
    /// The median: the mean of the middle two for an even number.
    Median,
}

/// How the bias moves and how condensers run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CondenserOptions {
    /// What a step adds to or takes from the bias of an expert; 0 or more. In phase one the code takes 1e-3 for
    /// Qwen1.5-MoE and 1e-4 for OLMoE and DeepSeek-V2-Lite, in phase two 5e-5.
    pub speed: f32,
    /// How condensers join.
    pub mode: CondenserMode,
    /// What use is compared with.
    pub center: Center,
    /// A bias of this or more grows no further.
    pub clip: Option<f32>,
}

impl Default for CondenserOptions {
    fn default() -> Self {
        Self { speed: 1e-3, mode: CondenserMode::Additive, center: Center::Mean, clip: None }
    }
}

impl CondenserOptions {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.speed >= 0.0 && self.speed.is_finite()) {
            return Err(Error::input("speed", self.speed, "a finite number of 0 or more"));
        }
        match self.clip {
            Some(clip) if !(clip > 0.0 && clip.is_finite()) => {
                Err(Error::input("clip", clip, "a finite number above 0"))
            }
            _ => Ok(()),
        }
    }
}

/// Biases and condensers of all MoE layers of a model: a [`RoutingOverlay`] to run the model under, and the
/// [`TrainingHooks`] that moves the bias.
#[derive(Debug)]
pub struct Condensers {
    layers: BTreeMap<usize, Arc<LayerRule>>,
    options: RwLock<CondenserOptions>,
}

/// What a layer has learnt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CondenserLayer {
    /// `b [E]`.
    pub bias: Vec<f32>,
    /// Sum over all tokens of the steps so far of the softmax with the bias of its time `[E]`.
    pub usage: Vec<f64>,
    /// How many times each expert was routed to in the steps so far `[E]`.
    pub routed: Vec<u64>,
    /// C, ascending, once selected; may be empty.
    pub condensers: Option<Vec<u32>>,
}

impl Condensers {
    /// Zero biases and no condensers, for a model with this configuration.
    ///
    /// # Errors
    /// [`Error::Input`] for options out of range or a model without experts; [`Error::Unsupported`] for a rule without
    /// a softmax over all experts.
    pub fn new(config: &ModelConfig, options: CondenserOptions) -> Result<Self> {
        options.validate()?;
        let name = match config.routing.kind {
            RoutingKind::SoftmaxTopK { .. } | RoutingKind::TopKSoftmax | RoutingKind::SoftmaxGroupTopK { .. } => None,
            RoutingKind::SoftmaxCorrected { .. } => Some("a correction bias of its own beside the softmax"),
            RoutingKind::Sigmoid { .. } => Some("a sigmoid per expert"),
            RoutingKind::Sparsemixer { .. } => Some("a softmax of its own for each choice"),
            _ => Some("a rule that is not known"),
        };
        if let Some(name) = name {
            let what = "condenser experts, whose bias is inside a softmax over all experts, with routing by";
            return Err(Error::Unsupported(format!("{what} {name}")));
        }
        let mut layers = BTreeMap::new();
        for (layer, moe) in (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?))) {
            layers.insert(layer, Arc::new(LayerRule::new(&config.routing, moe.num_experts(), options.mode)?));
        }
        if layers.is_empty() {
            return Err(Error::input("layers with routed experts", 0, "at least one"));
        }
        Ok(Self { layers, options: RwLock::new(options) })
    }

    /// How the bias moves and how condensers run.
    pub fn options(&self) -> CondenserOptions {
        *self.options.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the bias at another speed from now on.
    ///
    /// # Errors
    /// [`Error::Input`] for one that is negative or not finite.
    pub fn set_speed(&self, speed: f32) -> Result<()> {
        let options = CondenserOptions { speed, ..self.options() };
        options.validate()?;
        *self.options.write().unwrap_or_else(PoisonError::into_inner) = options;
        Ok(())
    }

    /// The overlay that runs a model with biases and condensers. It follows what they become.
    pub fn overlay(&self) -> Arc<dyn RoutingOverlay> {
        Arc::new(Overlay(self.layers.clone()))
    }

    /// Has use counted in every sweep that trains adapters of `set`. The model must run under the
    /// [overlay](Self::overlay).
    pub fn count_in(&self, set: &mut AdapterSet) {
        for (&layer, rule) in &self.layers {
            set.add_router(layer, rule.clone());
        }
    }

    /// `model` under the overlay. It must have none of its own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model with an overlay of its routing, [`Error::Input`] for another model.
    pub fn applied_to(&self, model: &Model) -> Result<Model> {
        if model.routing_overlay().is_some() {
            return Err(Error::Unsupported("condenser experts on a model whose routing is changed already".into()));
        }
        for (&layer, rule) in &self.layers {
            let found = model.config().moe(layer).map_or(0, |moe| moe.num_experts());
            if found != rule.experts() {
                return Err(Error::input(format!("experts of layer {layer}"), found, rule.experts()));
            }
        }
        Ok(model.with_overlays(model.expert_overlay().cloned(), Some(self.overlay()))?)
    }

    /// Moves the biases by the use counted since the last step, and forgets that use. To be called once after each
    /// optimizer step.
    pub fn step(&self) {
        let options = self.options();
        self.layers.values().for_each(|rule| rule.step(&options));
    }

    /// Adds use of a layer's experts `[E]`, as another worker of the same step counted it.
    ///
    /// # Errors
    /// [`Error::Input`] for a layer without experts, another number of them, or numbers that are not finite.
    pub fn add_usage(&self, layer: usize, usage: &[f64]) -> Result<()> {
        let rule = self.rule_of(layer)?;
        if usage.len() != rule.experts() || usage.iter().any(|u| !u.is_finite()) {
            return Err(Error::input(
                format!("use of the experts of layer {layer}"),
                format!("{usage:?}"),
                format!("{} finite numbers", rule.experts()),
            ));
        }
        rule.add_pending(usage);
        Ok(())
    }

    /// What the layer has learnt.
    pub fn layer(&self, layer: usize) -> Option<CondenserLayer> {
        self.layers.get(&layer).map(|rule| rule.learnt())
    }

    /// The layers, ascending.
    pub fn layers(&self) -> impl Iterator<Item = usize> {
        self.layers.keys().copied()
    }

    fn rule_of(&self, layer: usize) -> Result<&Arc<LayerRule>> {
        self.layers.get(&layer).ok_or_else(|| Error::input("layer", layer, "one with routed experts"))
    }

    /// Makes experts condensers: once, and never others. Those of a layer with the lowest bias (or the highest), on a
    /// tie the ones with the lowest use so far, then the lowest index. Biases that moved by the same steps in the same
    /// direction are equal, so that ties are the rule.
    ///
    /// # Errors
    /// [`Error::Input`] if condensers were selected before, if there are more than the layers or the mode allow, and if
    /// the bias of a layer that gets some is zero: without phase one nothing says which experts starve.
    pub fn select(&self, counts: &CondenserCounts, starved: Starved) -> Result<()> {
        let learnt: BTreeMap<usize, CondenserLayer> = self.layers().filter_map(|l| Some((l, self.layer(l)?))).collect();
        if let Some((layer, _)) = learnt.iter().find(|(_, learnt)| learnt.condensers.is_some()) {
            let what = format!("condensers of layer {layer}");
            return Err(Error::input(what, "selected before", "none; they are selected once"));
        }
        let counts = counts.of_layers(&learnt)?;
        let mut chosen = Vec::new();
        for ((layer, rule), r) in self.layers.iter().zip(counts) {
            let learnt = &learnt[layer];
            let limit = rule.most_condensers();
            if r > limit {
                return Err(Error::input(format!("condensers of layer {layer}"), r, format!("at most {limit}")));
            }
            if r > 0 && learnt.bias.iter().all(|b| *b == 0.0) {
                let expected = "one that was learnt in a first phase without condensers";
                return Err(Error::input(format!("bias of layer {layer}"), "all zero", expected));
            }
            chosen.push((rule, select::starved(learnt, r, starved)));
        }
        chosen.into_iter().for_each(|(rule, condensers)| rule.condense(condensers));
        Ok(())
    }

    /// Whether so many condensers can be selected.
    ///
    /// # Errors
    /// [`Error::Input`] if there are more than the layers or the mode allow.
    pub fn check_counts(&self, counts: &CondenserCounts) -> Result<()> {
        let learnt: BTreeMap<usize, CondenserLayer> = self.layers().filter_map(|l| Some((l, self.layer(l)?))).collect();
        for ((layer, rule), r) in self.layers.iter().zip(counts.of_layers(&learnt)?) {
            if r > rule.most_condensers() {
                let expected = format!("at most {}", rule.most_condensers());
                return Err(Error::input(format!("condensers of layer {layer}"), r, expected));
            }
        }
        Ok(())
    }

    /// Takes over what layers had learnt.
    ///
    /// # Errors
    /// [`Error::Input`] for other layers, other numbers of experts, numbers that are not finite and experts that do not
    /// exist.
    pub fn restore(&self, layers: BTreeMap<usize, CondenserLayer>) -> Result<()> {
        let (found, expected): (Vec<_>, Vec<_>) = (layers.keys().copied().collect(), self.layers().collect());
        if found != expected {
            return Err(Error::input("layers with condensers", format!("{found:?}"), format!("{expected:?}")));
        }
        for (layer, learnt) in &layers {
            self.rule_of(*layer)?.check(*layer, learnt)?;
        }
        layers.into_iter().for_each(|(layer, learnt)| self.layers[&layer].restore(learnt));
        Ok(())
    }
}

impl TrainingHooks for Arc<Condensers> {
    fn after_step(&mut self, _: usize, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        self.step();
        Ok(())
    }

    fn state_save(&self) -> Result<TaskState> {
        let mut state = TaskState::default();
        let mut chosen = BTreeMap::new();
        for layer in self.layers() {
            let Some(CondenserLayer { bias, usage, routed, condensers }) = self.layer(layer) else { continue };
            let mut add = |name: &str, values: Vec<f32>| {
                let shape = vec![values.len()];
                state.arrays.insert(format!("layers.{layer}.{name}"), StateArray { shape, values });
            };
            add("bias", bias);
            // exact: halves of the bits of each number, as integers below 2^16
            add("usage", usage.iter().flat_map(|u| parts(u.to_bits())).collect());
            add("routed", routed.iter().flat_map(|n| parts(*n)).collect());
            chosen.insert(layer, condensers);
        }
        state.json = serde_json::to_value(&chosen).map_err(|error| Error::Unsupported(error.to_string()))?;
        Ok(state)
    }

    fn state_load(&mut self, mut state: TaskState, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        let malformed = |what: String| Error::input("saved state of condensers", what, "that of the same model");
        let chosen: BTreeMap<usize, Option<Vec<u32>>> =
            serde_json::from_value(state.json).map_err(|error| malformed(error.to_string()))?;
        let mut layers = BTreeMap::new();
        for (layer, condensers) in chosen {
            let mut take = |name: &str| {
                let name = format!("layers.{layer}.{name}");
                state.arrays.remove(&name).map(|array| array.values).ok_or_else(|| malformed(format!("no {name}")))
            };
            let bias = take("bias")?;
            let usage = whole(&take("usage")?).map(f64::from_bits).collect();
            let routed = whole(&take("routed")?).collect();
            layers.insert(layer, CondenserLayer { bias, usage, routed, condensers });
        }
        self.restore(layers)
    }
}

/// Four numbers below 2^16, which f32 holds exactly.
fn parts(bits: u64) -> [f32; 4] {
    [0, 16, 32, 48].map(|shift| f32::from((bits >> shift) as u16))
}

/// The numbers that [`parts`] cut.
fn whole(parts: &[f32]) -> impl Iterator<Item = u64> {
    parts.chunks_exact(4).map(|four| four.iter().rev().fold(0, |bits, part| bits << 16 | u64::from(*part as u16)))
}

/// Runs a model with biases and condensers.
struct Overlay(BTreeMap<usize, Arc<LayerRule>>);

impl RoutingOverlay for Overlay {
    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.0.get(&layer).map(|rule| rule.clone() as _)
    }
}
