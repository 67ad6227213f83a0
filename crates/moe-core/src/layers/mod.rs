//! Weights of the parts of a decoder layer, and their forward and backward passes.
//!
//! Backward passes are written by hand: base weights are frozen, so only gradients with respect to inputs are needed, nothing is
//! recorded that is not used, and every temporary has a known size.

mod attention;
mod dense;
mod ffn;
mod grouped;
mod latent;
mod norm;
#[cfg(all(test, feature = "flex"))]
mod tests;

use std::ops::Range;

use burn::tensor::Tensor;

pub use attention::{AttentionLayer, AttentionTape, CacheEntry, Projections};
pub use dense::{DENSE_ROWS, DenseBlock};
pub use ffn::{FfnLayer, RouterLayer};
pub use grouped::{GroupedProjections, HeadNorms};
pub use latent::{LatentProjections, LowRankQuery, QueryProjection};
pub use norm::Norm;

use crate::kernels::weight::Weight;

/// A linear map with an optional bias `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Tensor<1>>,
}

impl Linear {
    /// `x w^T + bias`.
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        self.weight.forward(x, self.bias.as_ref())
    }

    /// `dy w`: the gradient with respect to `x`.
    pub fn backward(&self, dy: &Tensor<2>) -> Tensor<2> {
        self.weight.backward(dy)
    }
}

pub(crate) fn slice_rows(x: &Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    if rows.len() == x.dims()[0] { x.clone() } else { x.clone().narrow(0, rows.start, rows.len()) }
}

/// `factor * x`, without an operation where the factor is 1.
pub(crate) fn scaled(x: Tensor<2>, factor: f32) -> Tensor<2> {
    if factor == 1.0 { x } else { x.mul_scalar(factor) }
}
