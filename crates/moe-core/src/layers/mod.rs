//! Weights of the parts of a decoder layer, and their forward and backward passes.
//!
//! Backward passes are written by hand: base weights are frozen, so only gradients with respect to inputs are needed,
//! nothing is recorded that is not used, and every temporary has a known size.

mod attention;
mod compressed;
mod convolved_heads;
mod delta;
mod dense;
mod ffn;
mod grouped;
mod head_mixture;
mod indexer;
mod latent;
mod layer_input;
mod lightning;
mod mamba;
mod mixer;
mod norm;
mod shared_keys;
mod short_convolution;
mod streams;
#[cfg(all(test, feature = "flex"))]
mod tests;

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

pub use attention::{AttentionLayer, AttentionTape, CacheEntry, Projections};
pub use compressed::{CompressedLayer, CompressedState, CompressedTape, Compressor, EntryIndexer};
pub use delta::{
    ApartProjections, DeltaLayer, DeltaProjections, DeltaState, DeltaTape, GateActivation, WideProjection,
};
pub use dense::{DENSE_ROWS, DenseBlock};
pub(crate) use ffn::BlockGradients;
pub use ffn::{ApartNorms, FfnLayer, LatentMaps, RouterLayer};
pub use grouped::{GroupedProjections, HeadGate, HeadNorms, QkvProjections};
pub use head_mixture::{HeadMixtureLayer, HeadMixtureTape};
pub use indexer::{ChosenKeys, IndexerLayer, KeyChoice};
pub use latent::{LatentProjections, LowRankQuery, QueryProjection};
pub use layer_input::LayerInput;
pub use lightning::{LightningLayer, LightningState, LightningTape};
pub use mamba::{MambaLayer, MambaState, MambaTape};
pub use mixer::{MixerLayer, MixerTape};
pub use norm::Norm;
pub use shared_keys::{Handover, QueryOnly, SharedKeys};
pub use short_convolution::{ConvolutionLayer, ConvolutionState, ConvolutionTape};
pub use streams::{HeadInput, HyperConnection, Mixing, StreamSum};

use crate::{
    adapters::{Tokens, VectorAdapter, Wanted},
    kernels::{reduce::column_sums, weight::Weight},
};

/// A linear map with an optional bias `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Tensor<1>>,
    /// What stands in for the bias, and is trained.
    pub bias_adapter: Option<Arc<dyn VectorAdapter>>,
}

impl Linear {
    /// A frozen linear map.
    pub fn new(weight: Weight, bias: Option<Tensor<1>>) -> Self {
        Self { weight, bias, bias_adapter: None }
    }

    /// Whether something of it is trained.
    pub(crate) fn is_trained(&self) -> bool {
        self.bias_adapter.is_some() || self.weight.adapter().is_some()
    }

    /// `x w^T + bias`.
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        let trained = self.bias_adapter.as_ref().map(|adapter| adapter.value());
        self.weight.forward(x, trained.as_ref().or(self.bias.as_ref()))
    }

    /// The gradient with respect to `x`, if it is wanted, and those of what is trained. `x` is asked for by an adapter
    /// only.
    pub fn backward(&self, x: impl FnOnce() -> Tensor<2>, dy: &Tensor<2>, wanted: Wanted) -> Option<Tensor<2>> {
        if let Some(adapter) = self.bias_adapter.as_ref().filter(|_| wanted.parameters) {
            adapter.add_gradient(&column_sums(dy));
        }
        self.weight.gradient(x, dy, Tokens::WAVE, wanted)
    }
}

/// Adds some gradients that are wanted or not, all alike.
pub(crate) fn sum_of(gradients: impl IntoIterator<Item = Option<Tensor<2>>>) -> Option<Tensor<2>> {
    let mut gradients = gradients.into_iter().flatten();
    let mut sum = crate::kernels::rows::RowAccumulator::from_tensor(gradients.next()?);
    gradients.for_each(|gradient| sum.add(&gradient));
    Some(sum.into_tensor())
}

pub(crate) fn slice_rows(x: &Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    if rows.len() == x.dims()[0] { x.clone() } else { x.clone().narrow(0, rows.start, rows.len()) }
}

/// `factor * x`, without an operation where the factor is 1.
pub(crate) fn scaled(x: Tensor<2>, factor: f32) -> Tensor<2> {
    if factor == 1.0 { x } else { x.mul_scalar(factor) }
}

/// `ln(1 + e^x)`; `x` where the difference is below the precision, as torch has it.
pub(crate) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
