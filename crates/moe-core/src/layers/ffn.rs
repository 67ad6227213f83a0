//! The feed-forward half of a layer.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{DenseBlock, Linear, Norm, scaled};
use crate::kernels::rows::RowAccumulator;

/// The feed-forward half of a layer with its norms: `x + norm(dense(norm(x)) + experts(norm(x)))`, as far as it has
/// them.
#[derive(Clone, Debug)]
pub struct FfnLayer {
    /// Input norm, where there is one.
    pub norm: Option<Norm>,
    /// Norm of the sum of the blocks, where there is one.
    pub output_norm: Option<Norm>,
    /// Norms of a dense block apart from the experts.
    pub apart: Option<Box<ApartNorms>>,
    /// Dense block of a dense layer, shared expert of an MoE layer.
    pub dense: Option<DenseBlock>,
    /// Router of an MoE layer.
    pub router: Option<RouterLayer>,
    /// Factor on the output before it is added to the input.
    pub residual: f32,
    /// Factor on the sum of input and output.
    pub scale: f32,
}

/// Norms of a dense block and of the experts beside it, each with its own.
#[derive(Clone, Debug)]
pub struct ApartNorms {
    /// Of what the dense block reads.
    pub dense_input: Norm,
    /// Of what it gives.
    pub dense_output: Norm,
    /// Of what the experts give together.
    pub experts_output: Norm,
}

/// Weights of a router.
#[derive(Clone, Debug)]
pub struct RouterLayer {
    /// Rows `[E, H]`.
    pub linear: Linear,
    /// Norm of the residual stream that it reads; without one it reads what the experts read.
    pub norm: Option<Norm>,
    /// Added to the scores for the selection of experts, not for their weights `[E]`.
    pub selection_bias: Option<Arc<[f32]>>,
    /// Factors on the weights of the experts `[E]`.
    pub scales: Option<Arc<[f32]>>,
}

/// What the blocks of a layer add up to, row by row.
pub(crate) struct BlockSums {
    experts: RowAccumulator,
    dense: Option<RowAccumulator>,
}

impl BlockSums {
    /// What experts are added to.
    pub fn experts(&mut self) -> &mut RowAccumulator {
        &mut self.experts
    }

    /// What the dense block is added to.
    pub fn dense(&mut self) -> &mut RowAccumulator {
        self.dense.as_mut().unwrap_or(&mut self.experts)
    }
}

/// Gradients at what the blocks of a layer give.
pub(crate) struct BlockGradients {
    /// At the sum of the experts `[T, H]`.
    pub experts: Tensor<2>,
    /// At the output of the dense block `[T, H]`.
    pub dense: Tensor<2>,
    /// At the input, around the blocks `[T, H]`.
    pub around: Tensor<2>,
}

impl RouterLayer {
    /// What the router reads of `x [T, H]`, given what the experts read.
    pub fn input(&self, x: &Tensor<2>, z: &Tensor<2>) -> Tensor<2> {
        self.norm.as_ref().map_or_else(|| z.clone(), |norm| norm.forward(x))
    }
}

impl FfnLayer {
    /// What the experts read of `x`, and the dense block unless it is apart.
    pub fn normed(&self, x: &Tensor<2>) -> Tensor<2> {
        self.norm.as_ref().map_or_else(|| x.clone(), |norm| norm.forward(x))
    }

    /// What the dense block reads of `x [T, H]`, given what the experts read.
    pub fn dense_input(&self, x: &Tensor<2>, z: &Tensor<2>) -> Tensor<2> {
        self.apart.as_ref().map_or_else(|| z.clone(), |apart| apart.dense_input.forward(x))
    }

    /// Whether the output is the input plus the sum of the blocks.
    fn is_plain(&self) -> bool {
        self.output_norm.is_none() && self.apart.is_none() && self.residual == 1.0 && self.scale == 1.0
    }

    /// Whether one of its norms is trained.
    pub(crate) fn trains_norms(&self) -> bool {
        let apart = self.apart.iter().flat_map(|a| [&a.dense_input, &a.dense_output, &a.experts_output]);
        let router = self.router.iter().filter_map(|router| router.norm.as_ref());
        self.norm.iter().chain(&self.output_norm).chain(apart).chain(router).any(Norm::is_trained)
    }

    /// What outputs of the blocks on `x` are added to, for [`output`](Self::output).
    pub(crate) fn sums(&self, x: &Tensor<2>) -> BlockSums {
        let zeros = || RowAccumulator::zeros(x.dims()[0], x.dims()[1], &x.device());
        BlockSums {
            experts: if self.is_plain() { RowAccumulator::from_tensor(x.clone()) } else { zeros() },
            dense: self.apart.is_some().then(zeros),
        }
    }

    /// `x` plus what the blocks give, and the sums that a backward pass through norms after the blocks needs.
    pub(crate) fn output(&self, x: &Tensor<2>, sums: BlockSums) -> (Tensor<2>, Vec<Tensor<2>>) {
        if self.is_plain() {
            return (sums.experts.into_tensor(), Vec::new());
        }
        let kept: Vec<Tensor<2>> =
            std::iter::once(sums.experts).chain(sums.dense).map(RowAccumulator::into_tensor).collect();
        let total = self.total(&kept);
        let half = match &self.output_norm {
            Some(norm) => norm.forward(&total),
            None => total,
        };
        let mut out = RowAccumulator::from_tensor(scaled(half, self.residual));
        out.add(x);
        let after = self.output_norm.is_some() || self.apart.is_some();
        (scaled(out.into_tensor(), self.scale), if after { kept } else { Vec::new() })
    }

    /// The sum of the blocks from the sums of each.
    fn total(&self, sums: &[Tensor<2>]) -> Tensor<2> {
        match (&self.apart, sums) {
            (Some(apart), [experts, dense]) => {
                let mut total = RowAccumulator::from_tensor(apart.dense_output.forward(dense));
                total.add(&apart.experts_output.forward(experts));
                total.into_tensor()
            }
            _ => sums[0].clone(),
        }
    }

    /// Gradients at the blocks, from that of the layer's output; `sums` as [`output`](Self::output) kept them. With
    /// `parameters`, also those of what is trained of the norms.
    pub(crate) fn block_gradients(&self, dy: Tensor<2>, sums: &[Tensor<2>], parameters: bool) -> BlockGradients {
        let around = scaled(dy, self.scale);
        let half = scaled(around.clone(), self.residual);
        let total = match &self.output_norm {
            Some(norm) => norm.backward(&self.total(sums), &half, parameters),
            None => half,
        };
        match (&self.apart, sums) {
            (Some(apart), [experts, dense]) => BlockGradients {
                experts: apart.experts_output.backward(experts, &total, parameters),
                dense: apart.dense_output.backward(dense, &total, parameters),
                around,
            },
            _ => BlockGradients { experts: total.clone(), dense: total, around },
        }
    }

    /// Gradient with respect to `x`, from those at what the experts read, at what the dense block reads where it is
    /// apart, at what the router reads where it has a norm, and around the blocks; with `parameters`, also those of
    /// what is trained of the norms.
    pub(crate) fn input_gradient(
        &self,
        x: &Tensor<2>,
        dz: RowAccumulator,
        [d_dense, d_router]: [Option<Tensor<2>>; 2],
        around: &Tensor<2>,
        parameters: bool,
    ) -> Tensor<2> {
        let dz = dz.into_tensor();
        let through = match &self.norm {
            Some(norm) => norm.backward(x, &dz, parameters),
            None => dz,
        };
        let mut dx = RowAccumulator::from_tensor(through);
        if let (Some(apart), Some(d_dense)) = (&self.apart, d_dense) {
            dx.add(&apart.dense_input.backward(x, &d_dense, parameters));
        }
        let norm = self.router.as_ref().and_then(|router| router.norm.as_ref());
        if let (Some(norm), Some(d_router)) = (norm, d_router) {
            dx.add(&norm.backward(x, &d_router, parameters));
        }
        dx.add(around);
        dx.into_tensor()
    }
}
