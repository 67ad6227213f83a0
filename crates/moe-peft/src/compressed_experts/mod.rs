//! Compressed experts: the last experts of a token become factors on what the first ones read.
//!
//! Source: "Efficiently Editing Mixture-of-Experts Models with Compressed Experts", arXiv 2503.00634, and its code. Of
//! the k experts `e_1 .. e_k` that routing gives a token, best first, with weights `w_1 .. w_k`, the first `m = k - n`
//! run. Each expert of the layer has a compressed form `CE[e]`: factors on the input of its gate projection `[H]`, on
//! its units `[I]` and on the input of its up projection `[H]`, all 1 at first. Those of the last n experts are mixed
//! by their weights, `c = sum q_i CE[e_i]` with `q_i = w_i / sum of the last n`, and every expert of the token that
//! runs is `f(x; c) = down((act(gate (x * c1)) * (up (x * c3))) * c2)`. Weights stay as they are: those of the m
//! experts are not divided by their sum again. Shared experts are not modulated.
//!
//! The router learns through the weights of the experts that run and through q. Where the last n weights sum to
//! nothing, q is equal shares and has no gradient. A training-free start is the model with its m best experts.

mod file;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use moe_core::{
    Model,
    adapters::{ExpertModulation, Modulation},
    host::{self, HostView},
    kernels::math,
    router::Routed,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, TuningMethod};

/// How many experts of a token are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressedExperts {
    /// n: so many experts of each token only give factors. Half of k in the paper; 0 leaves the model as it is.
    pub auxiliary: usize,
}

/// The compressed experts of a model, by decoder layer: `[E, 2H + I]`, the factors on gate inputs, on units, and on up
/// inputs of each.
#[derive(Clone, Debug, Default)]
pub struct CompressedLayers {
    auxiliary: usize,
    layers: BTreeMap<usize, Arc<CompressedLayer>>,
}

/// Compressed experts of one layer.
#[derive(Debug)]
struct CompressedLayer {
    main: usize,
    hidden: usize,
    width: usize,
    live: Arc<Live>,
    /// Whose factors were mixed in the sweeps that train so far `[E]`.
    reached: Mutex<Vec<bool>>,
}

impl CompressedExperts {
    fn install_with(
        &self,
        model: &Model,
        set: &mut AdapterSet,
        mut values: impl FnMut(usize, [usize; 2]) -> Result<Vec<f32>>,
    ) -> Result<CompressedLayers> {
        self.validate(model)?;
        let config = model.config();
        let mut layers = BTreeMap::new();
        let moe = (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?)));
        for (layer, moe) in moe.filter(|_| self.auxiliary > 0) {
            let top_k = config.routing.top_k.min(moe.num_experts());
            let width = moe.widths.first().copied().unwrap_or(0);
            let shape = [moe.num_experts(), 2 * config.expert_hidden_size() + width];
            let live = Live::new(name(layer), shape, values(layer, shape)?, model.device())?;
            set.bank_mut().insert(live.clone())?;
            let reached = Mutex::new(vec![false; shape[0]]);
            let (main, hidden) = (top_k - self.auxiliary, config.expert_hidden_size());
            let compressed = Arc::new(CompressedLayer { main, hidden, width, live, reached });
            set.add_modulation(layer, compressed.clone())?;
            layers.insert(layer, compressed);
        }
        Ok(CompressedLayers { auxiliary: self.auxiliary, layers })
    }
}

impl CompressedExperts {
    /// # Errors
    /// [`Error::Input`] if no expert of a token would run, experts of a layer differ in width, or there is no routed
    /// expert.
    fn validate(&self, model: &Model) -> Result<()> {
        let config = model.config();
        let moe = (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?)));
        let moe: Vec<_> = moe.filter(|_| self.auxiliary > 0).collect();
        for (layer, moe) in &moe {
            let top_k = config.routing.top_k.min(moe.num_experts());
            if self.auxiliary >= top_k {
                let expected = format!("below the {top_k} experts per token of layer {layer}");
                return Err(Error::input("auxiliary", self.auxiliary, expected));
            }
            let width = moe.widths.first().copied().unwrap_or(0);
            if let Some(other) = moe.widths.iter().find(|other| **other != width) {
                let what = format!("widths of the experts of layer {layer}");
                return Err(Error::input(what, format!("{width} and {other}"), "one width, which factors fit"));
            }
        }
        match moe.is_empty() && self.auxiliary > 0 {
            true => Err(Error::input("layers with routed experts", 0, "at least one")),
            false => Ok(()),
        }
    }
}

/// Adds compressed experts, all factors 1, to every MoE layer, and trains them.
impl TuningMethod for CompressedExperts {
    /// # Errors
    /// [`Error::Input`] if no expert of a token would run, or experts of a layer differ in width.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.validate(on.model)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let compressed = self.install_with(on.model, set, |_, shape| Ok(vec![1.0; shape[0] * shape[1]]))?;
        Ok(Artifacts { compressed: Some(compressed), ..Artifacts::default() }.into())
    }
}

impl CompressedLayers {
    /// Which experts of a layer were mixed into factors while training, `[E]`: only those have had gradients.
    pub fn reached(&self, layer: usize) -> Option<Vec<bool>> {
        self.layers.get(&layer).map(|layer| layer.reached.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Trained values in all.
    pub fn values(&self) -> usize {
        self.layers.values().map(|layer| layer.live.shape().iter().product::<usize>()).sum()
    }
}

/// Name of a layer's compressed experts among the parameters.
fn name(layer: usize) -> String {
    format!("layers.{layer}.compressed_experts")
}

impl CompressedLayer {
    /// Shares of a token's auxiliary experts, and the sum of their weights, unless it is nothing.
    fn shares<'a>(&self, weights: &'a [f32]) -> (impl Iterator<Item = f32> + 'a, Option<f32>) {
        let auxiliary = &weights[self.main..];
        let sum = Some(auxiliary.iter().sum::<f32>()).filter(|sum| *sum > f32::MIN_POSITIVE);
        let equal = 1.0 / auxiliary.len() as f32;
        (auxiliary.iter().map(move |w| sum.map_or(equal, |sum| w / sum)), sum)
    }
}

impl ExpertModulation for CompressedLayer {
    fn main_experts(&self) -> usize {
        self.main
    }

    fn factors(&self, routed: &Routed) -> Modulation {
        let (h, i, k) = (self.hidden, self.width, routed.top_k);
        let row = 2 * h + i;
        let tokens = routed.weights.len() / k;
        let view = HostView::new(&self.live.value());
        let compressed = view.as_slice();
        let mut parts = [vec![0.0f32; tokens * h], vec![0.0f32; tokens * i], vec![0.0f32; tokens * h]];
        let [gate, units, up] = &mut parts;
        let rows = gate.par_chunks_mut(h.max(1)).zip(units.par_chunks_mut(i.max(1))).zip(up.par_chunks_mut(h.max(1)));
        let slots = routed.selected.par_chunks(k).zip(routed.weights.par_chunks(k));
        rows.zip(slots).for_each(|(((gate, units), up), (selected, weights))| {
            let (shares, _) = self.shares(weights);
            for (&e, q) in selected[self.main..].iter().zip(shares) {
                let compressed = &compressed[e as usize * row..][..row];
                let (first, rest) = compressed.split_at(h);
                let (second, third) = rest.split_at(i);
                for (sum, from) in [(&mut *gate, first), (&mut *units, second), (&mut *up, third)] {
                    sum.iter_mut().zip(from).for_each(|(sum, x)| *sum += q * x);
                }
            }
        });
        let [gate, units, up] = parts;
        let device = self.live.device();
        Modulation {
            gate: host::from_vec(gate, [tokens, h], device),
            units: host::from_vec(units, [tokens, i], device),
            up: host::from_vec(up, [tokens, h], device),
        }
    }

    fn backward(&self, routed: &Routed, d_factors: &Modulation, parameters: bool, d_weights: &mut [f32]) {
        let (h, i, k, main) = (self.hidden, self.width, routed.top_k, self.main);
        let row = 2 * h + i;
        let view = HostView::new(&self.live.value());
        let compressed = view.as_slice();
        let [gate, units, up] = [&d_factors.gate, &d_factors.units, &d_factors.up].map(HostView::new);
        let d_of = |t: usize| {
            let part = |view: &HostView, columns: usize| view.as_slice()[t * columns..(t + 1) * columns].to_vec();
            [part(&gate, h), part(&units, i), part(&up, h)].concat()
        };
        // with D_i = <dc, CE_i>: dw_i = (D_i - sum_j q_j D_j) / sum of the weights
        let slots = routed.selected.par_chunks(k).zip(routed.weights.par_chunks(k));
        d_weights.par_chunks_mut(k).zip(slots).enumerate().for_each(|(t, (d_weights, (selected, weights)))| {
            let (shares, sum) = self.shares(weights);
            let Some(sum) = sum else { return };
            let d = d_of(t);
            let along = |e: &u32| math::dot(&d, &compressed[*e as usize * row..][..row]);
            let along: Vec<f32> = selected[main..].iter().map(along).collect();
            let mean: f32 = along.iter().zip(shares).map(|(d, q)| d * q).sum();
            d_weights[main..].iter_mut().zip(along).for_each(|(dw, d)| *dw = (d - mean) / sum);
        });
        if !(parameters && self.live.is_trained()) {
            return;
        }
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        self.live.add_gradient(|gradient| {
            let slots = routed.selected.chunks_exact(k).zip(routed.weights.chunks_exact(k));
            for (t, (selected, weights)) in slots.enumerate() {
                let d = d_of(t);
                for (&e, q) in selected[main..].iter().zip(self.shares(weights).0) {
                    reached[e as usize] = true;
                    let gradient = &mut gradient[e as usize * row..][..row];
                    gradient.iter_mut().zip(&d).for_each(|(sum, d)| *sum += q * d);
                }
            }
        });
    }
}
