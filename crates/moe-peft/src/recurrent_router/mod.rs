//! A recurrent router across layers, beside a model whose weights may stay frozen.
//!
//! Source: RMoE, arXiv 2408.06793, and its code. A token has a state that goes from MoE layer to MoE layer, not from
//! token to token: with `u_i = A_i x_i` of what the router of layer i reads, `h_i = cell(u_i, h_{i-1})` by one cell
//! that all layers share (`h` is 0 before the first), and logits `G_i h_i`. The gradient goes through the states of all
//! layers. The cell is a GRU: `s = sigma(W_s u + b_s + U_s h + c_s)`, `q` alike, `n = tanh(W_n u + b_n + s (U_n h +
//! c_n))`, `h' = (1 - q) n + q h`, with matrices and biases of its own in each place, as the code has them.
//!
//! Beside a trained model the logits are added to those of the router ([`RecurrentForm::Beside`]), with `G` of zeros at
//! first: the model as it was, bit for bit. [`RecurrentForm::Instead`] is the published form, for training from
//! scratch.

mod cell;
mod file;
mod layer;
mod tuning;

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::ModelConfig;
use moe_core::{LogitTransform, Model, RoutingOverlay, adapters::Depth};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Live, Result};
pub use cell::Cell;
use layer::{RecurrentLayer, Shared};
pub use tuning::RecurrentRouterTuning;

/// The size and form of a recurrent router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecurrentOptions {
    /// Width of the state, r: 128 in most runs of the paper, 256 in the released configuration.
    pub width: usize,
    /// What makes a state of the one before.
    pub cell: Cell,
    /// Whether its logits stand beside those of the model's router.
    pub form: RecurrentForm,
    /// Seed of what it begins as.
    pub seed: u64,
}

/// What becomes of the model's own router.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecurrentForm {
    /// Its logits and the recurrent ones are added.
    #[default]
    Beside,
    /// The recurrent logits alone.
    Instead,
}

impl Default for RecurrentOptions {
    fn default() -> Self {
        Self { width: 128, cell: Cell::Gru, form: RecurrentForm::Beside, seed: 0 }
    }
}

/// A recurrent router of a model.
#[derive(Debug)]
pub struct RecurrentRouter {
    options: RecurrentOptions,
    shared: Arc<Shared>,
    layers: BTreeMap<usize, Arc<RecurrentLayer>>,
}

/// Values of an array by name and shape.
type Values<'a> = dyn FnMut(&str, [usize; 2]) -> Result<Vec<f32>> + 'a;

impl RecurrentRouter {
    /// A new one: even weights in `[-r^-0.5, r^-0.5]`, as PyTorch begins a GRU, `A` in `[-H^-0.5, H^-0.5]`, and `G` of
    /// zeros where it stands beside the model's router.
    ///
    /// # Errors
    /// [`Error::Input`] for no width, or a model without experts.
    pub fn new(model: &Model, options: RecurrentOptions) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(options.seed);
        let mut even = |count: usize, bound: f32| -> Vec<f32> {
            (0..count).map(|_| (random.random::<f32>() * 2.0 - 1.0) * bound).collect()
        };
        let r = options.width;
        let bound = (r.max(1) as f32).powf(-0.5);
        let hidden = model.config().hidden_size;
        Self::with(model.config(), options, model.device(), &mut |name, shape| {
            let count = shape.iter().product();
            Ok(match name.rsplit('.').next() {
                Some("input") => even(count, (hidden as f32).powf(-0.5)),
                Some("output") if options.form == RecurrentForm::Beside => vec![0.0; count],
                _ => even(count, bound),
            })
        })
    }

    /// With values by name and shape.
    fn with(
        config: &ModelConfig,
        options: RecurrentOptions,
        device: &burn::tensor::Device,
        values: &mut Values<'_>,
    ) -> Result<Self> {
        let (r, hidden) = (options.width, config.hidden_size);
        if r == 0 {
            return Err(Error::input("width", 0, "at least 1"));
        }
        let mut live = |name: String, shape: [usize; 2]| -> Result<Arc<Live>> {
            let values = values(&name, shape)?;
            Live::new(name, shape, values, device)
        };
        let gates = options.cell.gates();
        let shared = Arc::new(Shared::new(
            options.cell,
            r,
            [
                live("recurrent_router.cell.input_weight".into(), [gates * r, r])?,
                live("recurrent_router.cell.state_weight".into(), [gates * r, r])?,
                live("recurrent_router.cell.input_bias".into(), [1, gates * r])?,
                live("recurrent_router.cell.state_bias".into(), [1, gates * r])?,
            ],
        ));
        let mut layers = BTreeMap::new();
        let moe = (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?.num_experts())));
        for (place, (layer, experts)) in moe.enumerate() {
            let input = live(format!("recurrent_router.layers.{layer}.input"), [r, hidden])?;
            let output = live(format!("recurrent_router.layers.{layer}.output"), [experts, r])?;
            let instead = options.form == RecurrentForm::Instead;
            layers.insert(layer, Arc::new(RecurrentLayer::new(place, shared.clone(), input, output, instead)));
        }
        if layers.is_empty() {
            return Err(Error::input("layers with routed experts", 0, "at least one"));
        }
        Ok(Self { options, shared, layers })
    }

    /// Everything that is trained, in order.
    fn lives(&self) -> impl Iterator<Item = &Arc<Live>> {
        self.shared.lives().iter().chain(self.layers.values().flat_map(|layer| layer.lives()))
    }

    /// Puts it among what a set trains.
    ///
    /// # Errors
    /// [`Error::Input`] if it is there already.
    pub fn train_in(&self, set: &mut AdapterSet) -> Result<()> {
        for live in self.lives().filter(|live| live.shape().iter().product::<usize>() > 0) {
            set.bank_mut().insert(live.clone())?;
        }
        if let Some(first) = self.layers.keys().next() {
            set.reach(Depth::FeedForward(*first));
        }
        Ok(())
    }

    /// `model` with the recurrent router. Its routing must not be changed otherwise.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model with an overlay of its routing or a path of layers, [`Error::Input`] for
    /// another model.
    pub fn applied_to(&self, model: &Model) -> Result<Model> {
        if model.routing_overlay().is_some() || !model.path().is_whole(model.config().layers.len()) {
            let what = "a recurrent router on a model whose routing or path of layers is changed already";
            return Err(Error::Unsupported(what.into()));
        }
        for (&layer, rule) in &self.layers {
            let found = model.config().moe(layer).map_or(0, |moe| moe.num_experts());
            if found != rule.experts() {
                return Err(Error::input(format!("experts of layer {layer}"), found, rule.experts()));
            }
        }
        Ok(model.routed_by(Arc::new(Overlay(self.layers.clone())))?)
    }

    /// Its size and form.
    pub fn options(&self) -> RecurrentOptions {
        self.options
    }

    /// The layers, ascending.
    pub fn layers(&self) -> impl Iterator<Item = usize> {
        self.layers.keys().copied()
    }
}

/// Changes the logits of a model.
struct Overlay(BTreeMap<usize, Arc<RecurrentLayer>>);

impl RoutingOverlay for Overlay {
    fn logits(&self, layer: usize) -> Option<Arc<dyn LogitTransform>> {
        self.0.get(&layer).map(|layer| layer.clone() as _)
    }
}
