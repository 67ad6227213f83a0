//! Ternary experts beside a shared expert in full precision, trained as they are rounded (MoTE, arXiv 2506.14435).

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use moe_checkpoint::WeightFormat;
use moe_core::{
    adapters::{LinearAdapter, Site, Tokens, Wanted},
    host,
    kernels::weight::Weight,
};
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, TuningMethod,
    model_weights::{Begin, OwnWeights, put_map},
    trainable_tensors::{self, Place},
};

/// Mixture of ternary experts: every matrix of every routed expert runs as -1, 0 or 1 times its mean magnitude, and its
/// latent weights get the gradient of what runs (a straight-through estimator). The shared expert and everything else
/// stays in full precision, frozen, but for the router.
///
/// The paper begins with a dense model, whose FFN becomes the shared expert and every routed one:
/// `moe upcycle --method copy` with a shared expert, or any Mixture of Experts that has one. What is saved is packed in
/// two bits per weight ([`WeightFormat::Ternary`]), and runs as it was trained. Activations are not rounded: the paper
/// has them in 8 bits, which the format that is written does not ask of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mote {
    /// Whether routers are trained, too.
    pub router: bool,
    /// Whether models without a shared expert are trained all the same: there is then nothing in full precision that
    /// every token passes.
    pub without_shared: bool,
}

impl Default for Mote {
    fn default() -> Self {
        Self { router: true, without_shared: false }
    }
}

impl Mote {
    fn put_into(&self, on: &Setting<'_>, set: &mut AdapterSet, begin: Begin) -> Result<Installed> {
        self.check(on)?;
        let checkpoint = on.model.checkpoint();
        for Place { site, dims } in trainable_tensors::linear_maps(checkpoint) {
            let Site::Expert { layer, map, .. } = site else { continue };
            if dims.contains(&0) {
                continue;
            }
            let parts = trainable_tensors::expert_parts(checkpoint, layer, map).len().max(1);
            let live = put_map(on.model, set, site, dims, begin)?;
            set.add(site, Arc::new(TernaryMatrix { live, parts }))?;
        }
        if self.router {
            OwnWeights::router().put_into(on.model, set, begin)?;
        }
        Ok(Artifacts { packed: Some(WeightFormat::Ternary), ..Artifacts::default() }.into())
    }
}

impl TuningMethod for Mote {
    /// # Errors
    /// [`Error::Input`] for a model without a shared expert, unless [`Mote::without_shared`], and for one whose experts
    /// have no place for quantized weights.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        let checkpoint = on.model.checkpoint();
        let layers = checkpoint.shape().layers.iter().map(|layer| layer.layer);
        let lacks = |layer: &usize| checkpoint.config().moe(*layer).is_none_or(|moe| moe.shared.is_none());
        if let Some(layer) = layers.clone().find(lacks).filter(|_| !self.without_shared) {
            let expected = "a shared expert, which stays in full precision: upcycle with one, or set `without_shared`";
            return Err(Error::input(format!("layer {layer} under ternary experts"), "no shared expert", expected));
        }
        if layers.count() == 0 {
            return Err(Error::input("a model for ternary experts", "a dense one", "one with routed experts"));
        }
        moe_checkpoint::Quantized::on(checkpoint, &moe_checkpoint::QuantizeOptions::new(WeightFormat::Ternary))?;
        Ok(())
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.put_into(on, set, Begin::Outlined)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.put_into(on, set, Begin::InMemory)
    }
}

/// A map that runs rounded: `parts` matrices one below the other, each with a scale of its own.
#[derive(Debug)]
struct TernaryMatrix {
    live: Arc<Live>,
    parts: usize,
}

impl TernaryMatrix {
    fn rounded(&self, values: Tensor<2>, device: &Device) -> Tensor<2> {
        let [rows, cols] = self.live.shape();
        let values = host::into_vec(values);
        let one = (rows / self.parts * cols).max(1);
        let parts = values.chunks(one).flat_map(|part| WeightFormat::ternary(part, cols));
        host::from_vec(parts.collect(), [rows, cols], device)
    }

    fn value(&self) -> Tensor<2> {
        self.rounded(self.live.value(), self.live.device())
    }
}

impl LinearAdapter for TernaryMatrix {
    fn dims(&self) -> [usize; 2] {
        self.live.shape()
    }

    fn replaces(&self) -> bool {
        !self.live.is_base()
    }

    fn trained(&self) -> usize {
        if self.live.is_trained() { self.live.shape().iter().product() } else { 0 }
    }

    fn forward(&self, _: &Weight, x: &Tensor<2>, _: Tokens<'_>) -> Tensor<2> {
        x.clone().matmul(self.value().transpose())
    }

    fn backward(&self, _: &Weight, x: &Tensor<2>, dy: &Tensor<2>, _: Tokens<'_>, wanted: Wanted) -> Option<Tensor<2>> {
        let [rows, columns] = self.live.shape();
        if wanted.parameters && self.live.is_trained() {
            // Straight through: the gradient of the rounded weight is that of the latent one.
            self.live.add_product(dy, 0..rows, x, 0..columns, 1.0);
        }
        wanted.input.then(|| dy.clone().matmul(self.value()))
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        let values = if self.live.is_base() { base.to_tensor() } else { self.live.value() };
        Some(self.rounded(values, self.live.device()))
    }

    fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        add(b"ternary");
        self.live.digest(add);
    }
}
