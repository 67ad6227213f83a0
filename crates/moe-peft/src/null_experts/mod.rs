//! Null experts: experts that do nothing, so that easy tokens use fewer of the others.
//!
//! Source: AdaMoE, arXiv 2406.13233. A router gets m more rows, and a token goes to its `top_k` best experts among all
//! n + m; what falls to a null expert is not computed. The weights of the true experts are what the model's rule makes
//! of them: their scores divided by their sum where the model does that, as the paper has it, and else their shares of
//! all n + m. A token of null experts alone passes the layer unchanged.
//!
//! Null experts are balanced as a whole (section 3.3): `L = a (n + m) sum_i f_i P_i`, with `f_i` the share of tokens
//! that go to expert i, for null experts the mean of theirs, and `P_i` its mean share of the scores. Permuting null
//! experts changes nothing. The official code does this otherwise in two ways, which are not followed. The coefficient
//! is tight in the first half of the training and loose in the second.
//!
//! Rules without a softmax, with groups, or with a bias on the selection are refused: null experts would need a place
//! in each.

mod file;
mod rule;
mod tuning;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use moe_checkpoint::{LayerRole, ModelConfig, Role, RoutingKind};
use moe_core::{Model, RoutingOverlay, RoutingRule, adapters::Depth};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Live, Result};
use rule::NullLayer;
pub use tuning::NullExpertTuning;

/// How many null experts there are, and how tokens go to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NullExpertOptions {
    /// Null experts of every layer, m. With copied rows, a multiple of the true ones.
    pub nulls: Option<usize>,
    /// Experts per token among all of them; one more than the model's by default.
    pub top_k: Option<usize>,
    /// What their rows begin as.
    pub init: NullInit,
}

/// What the rows of null experts begin as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NullInit {
    /// Copies of the rows of the true experts, in turn (the paper's).
    #[default]
    Copy,
    /// Zeros: logits of 0.
    Zeros,
}

impl Default for NullExpertOptions {
    fn default() -> Self {
        Self { nulls: None, top_k: None, init: NullInit::Copy }
    }
}

/// Null experts of all MoE layers of a model.
#[derive(Debug)]
pub struct NullExperts {
    layers: BTreeMap<usize, Arc<NullLayer>>,
    /// Coefficient of the balance loss.
    balance: Arc<RwLock<f64>>,
}

impl NullExperts {
    /// Refuses models whose rule has no place for null experts.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check(config: &ModelConfig) -> Result<()> {
        match config.routing.kind {
            RoutingKind::SoftmaxTopK { .. } | RoutingKind::TopKSoftmax => Ok(()),
            _ => {
                let what = "null experts with routing that is no plain softmax and choice of the largest scores";
                Err(Error::Unsupported(what.into()))
            }
        }
    }

    /// Adds null experts to a model.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a rule without a place for them; [`Error::Input`] for numbers that do not fit; what
    /// keeps the routers from being read.
    pub fn new(model: &Model, options: &NullExpertOptions) -> Result<Self> {
        let config = model.config();
        Self::check(config)?;
        let balance = Arc::new(RwLock::new(0.0));
        let mut layers = BTreeMap::new();
        for (layer, moe) in (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?))) {
            let (experts, hidden) = (moe.num_experts(), config.hidden_size);
            let nulls = options.nulls.unwrap_or(experts);
            if options.init == NullInit::Copy && !nulls.is_multiple_of(experts) {
                let expected = format!("a multiple of the {experts} experts, whose rows they begin as");
                return Err(Error::input(format!("null experts of layer {layer}"), nulls, expected));
            }
            let top_k = options.top_k.unwrap_or(config.routing.top_k + 1);
            let most = experts.min(experts + nulls);
            if !(1..=most).contains(&top_k) {
                let expected = format!("1 to {most}, so that true experts alone could be chosen");
                return Err(Error::input(format!("experts per token of layer {layer}"), top_k, expected));
            }
            let router = model.checkpoint().read_f32(Role::Layer(layer, LayerRole::Router))?;
            let rows = match options.init {
                NullInit::Zeros => vec![0.0; nulls * hidden],
                NullInit::Copy => router.iter().copied().cycle().take(nulls * hidden).collect(),
            };
            let live = Live::new(name(layer), [nulls, hidden], rows, model.device())?;
            layers.insert(layer, Arc::new(NullLayer::new(layer, experts, top_k, live, balance.clone())));
        }
        if layers.is_empty() {
            return Err(Error::input("layers with routed experts", 0, "at least one"));
        }
        Ok(Self { layers, balance })
    }

    /// Balances the load with this coefficient from the next sweep on.
    pub fn set_balance(&self, coefficient: f64) {
        *self.balance.write().unwrap_or_else(PoisonError::into_inner) = coefficient;
    }

    /// Puts the rows among what a set trains.
    ///
    /// # Errors
    /// [`Error::Input`] if they are there already.
    pub fn train_in(&self, set: &mut AdapterSet) -> Result<()> {
        for (&layer, rule) in &self.layers {
            set.bank_mut().insert(rule.rows().clone())?;
            set.reach(Depth::FeedForward(layer));
            set.add_listener(rule.clone());
        }
        Ok(())
    }

    /// `model` with its null experts. Its routing must not be changed otherwise.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model with an overlay of its routing, [`Error::Input`] for another model.
    pub fn applied_to(&self, model: &Model) -> Result<Model> {
        if model.routing_overlay().is_some() {
            return Err(Error::Unsupported("null experts on a model whose routing is changed already".into()));
        }
        for (&layer, rule) in &self.layers {
            let found = model.config().moe(layer).map_or(0, |moe| moe.num_experts());
            if found != rule.experts() {
                return Err(Error::input(format!("experts of layer {layer}"), found, rule.experts()));
            }
        }
        Ok(model.routed_by(Arc::new(Overlay(self.layers.clone())))?)
    }

    /// The layers, ascending.
    pub fn layers(&self) -> impl Iterator<Item = usize> {
        self.layers.keys().copied()
    }
}

fn name(layer: usize) -> String {
    format!("layers.{layer}.null_experts")
}

/// Routes a model among true and null experts.
struct Overlay(BTreeMap<usize, Arc<NullLayer>>);

impl RoutingOverlay for Overlay {
    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.0.get(&layer).map(|rule| rule.clone() as _)
    }
}
