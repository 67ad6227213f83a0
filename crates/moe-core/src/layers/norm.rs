//! The norm in front of a block.

use burn::tensor::Tensor;

use crate::kernels::{
    layer_norm::{layer_norm, layer_norm_backward},
    norm::{rms_norm, rms_norm_backward},
};

/// A norm over the rows of `x [n, d]`.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[d]`.
    pub weight: Tensor<1>,
    /// `[d]` of a LayerNorm; an RMSNorm has none.
    pub bias: Option<Tensor<1>>,
    /// Added to the mean square or variance.
    pub eps: f32,
}

impl Norm {
    /// `norm(x)`.
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        match &self.bias {
            None => rms_norm(x, &self.weight, self.eps),
            Some(bias) => layer_norm(x, &self.weight, bias, self.eps),
        }
    }

    /// Gradient with respect to `x`, given that of the result.
    pub fn backward(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Tensor<2> {
        match &self.bias {
            None => rms_norm_backward(x, &self.weight, self.eps, dy),
            Some(_) => layer_norm_backward(x, &self.weight, self.eps, dy),
        }
    }
}
