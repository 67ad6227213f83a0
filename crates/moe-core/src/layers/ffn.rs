//! The feed-forward half of a layer.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{DenseBlock, Linear, Norm, scaled};
use crate::kernels::rows::RowAccumulator;

/// The feed-forward half of a layer with its norm.
#[derive(Clone, Debug)]
pub struct FfnLayer {
    /// Input norm.
    pub norm: Norm,
    /// Dense block of a dense layer, shared expert of an MoE layer.
    pub dense: Option<DenseBlock>,
    /// Router of an MoE layer.
    pub router: Option<RouterLayer>,
    /// Factor on the output before it is added to the input.
    pub residual: f32,
}

/// Weights of a router.
#[derive(Clone, Debug)]
pub struct RouterLayer {
    /// Rows `[E, H]`.
    pub linear: Linear,
    /// Added to the scores for the selection of experts, not for their weights `[E]`.
    pub selection_bias: Option<Arc<[f32]>>,
}

impl FfnLayer {
    /// `norm(x)`.
    pub fn normed(&self, x: &Tensor<2>) -> Tensor<2> {
        self.norm.forward(x)
    }

    /// What outputs of the blocks on `x` are added to, for [`output`](Self::output).
    pub fn accumulator(&self, x: &Tensor<2>) -> RowAccumulator {
        if self.residual == 1.0 {
            RowAccumulator::from_tensor(x.clone())
        } else {
            RowAccumulator::zeros(x.dims()[0], x.dims()[1], &x.device())
        }
    }

    /// `x` plus the sum of the blocks times the residual factor.
    pub fn output(&self, x: &Tensor<2>, sum: RowAccumulator) -> Tensor<2> {
        if self.residual == 1.0 {
            return sum.into_tensor();
        }
        let mut out = RowAccumulator::from_tensor(scaled(sum.into_tensor(), self.residual));
        out.add(x);
        out.into_tensor()
    }

    /// Gradient at the sum of the blocks, from that of the layer's output.
    pub fn block_gradient(&self, dy: &Tensor<2>) -> Tensor<2> {
        scaled(dy.clone(), self.residual)
    }

    /// `dy + norm'(x) dz`: the gradient through the residual and the norm; with `parameters`, also those of what is trained of the norm.
    pub fn input_gradient(&self, x: &Tensor<2>, dz: RowAccumulator, dy: &Tensor<2>, parameters: bool) -> Tensor<2> {
        let mut dx = RowAccumulator::from_tensor(self.norm.backward(x, &dz.into_tensor(), parameters));
        dx.add(dy);
        dx.into_tensor()
    }
}
