//! The feed-forward half of a layer.

use std::sync::Arc;

use burn::tensor::Tensor;
use moe_checkpoint::ExpertTable;

use super::{DenseBlock, HyperConnection, Linear, Mixing, Norm, scaled};
use crate::{
    adapters::{Tokens, Wanted},
    kernels::{rows::RowAccumulator, weight::Weight},
};

/// The feed-forward half of a layer with its norms: `x + norm(dense(norm(x)) + experts(norm(x)))`, as far as it has
/// them.
#[derive(Clone, Debug)]
pub struct FfnLayer {
    /// How it reads and writes several residual streams, where there are several: what it is given are all of them.
    pub streams: Option<Arc<HyperConnection>>,
    /// Input norm, where there is one.
    pub norm: Option<Norm>,
    /// Norm of the sum of the blocks, where there is one.
    pub output_norm: Option<Norm>,
    /// Norms of a dense block apart from the experts.
    pub apart: Option<Box<ApartNorms>>,
    /// Maps around experts that read a latent.
    pub latent: Option<Box<LatentMaps>>,
    /// Dense block of a dense layer, shared expert of an MoE layer.
    pub dense: Option<DenseBlock>,
    /// Router of an MoE layer.
    pub router: Option<RouterLayer>,
    /// Identity experts, the last rows of the router.
    pub identities: usize,
    /// Whether what the experts give goes beside the residual stream to the end of the next layer: the output is then
    /// `[T, 2 H]`, the stream and what the experts give.
    pub shortcut: bool,
    /// Factor on the output before it is added to the input.
    pub residual: f32,
    /// Factor on the sum of input and output.
    pub scale: f32,
    /// Factor on the normed input, where the output is added to that instead of the input itself.
    pub carry: Option<f32>,
    /// Added to the output `[H]`, where there is one.
    pub bias: Option<Tensor<1>>,
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

/// Maps around routed experts that read and give a latent of width `L` in place of the residual stream.
#[derive(Clone, Debug)]
pub struct LatentMaps {
    /// Down to the latent, in front of the experts `[L, H]`.
    pub down: Weight,
    /// Up from the sum of what they give `[H, L]`.
    pub up: Weight,
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
    /// The experts of every token of the vocabulary, where scores do not choose them.
    pub table: Option<Arc<ExpertTable>>,
    /// Factors on the weights of the experts `[E]`.
    pub scales: Option<Arc<[f32]>>,
}

/// What the blocks of a layer add up to, row by row.
pub(crate) struct BlockSums {
    experts: RowAccumulator,
    latent: Option<RowAccumulator>,
    dense: Option<RowAccumulator>,
}

impl BlockSums {
    /// What experts are added to.
    pub fn experts(&mut self) -> &mut RowAccumulator {
        self.latent.as_mut().unwrap_or(&mut self.experts)
    }

    /// What the dense block is added to.
    pub fn dense(&mut self) -> &mut RowAccumulator {
        self.dense.as_mut().unwrap_or(&mut self.experts)
    }
}

/// Gradients at what the blocks of a layer give.
pub(crate) struct BlockGradients {
    /// At the sum of the experts `[T, H]`, or of their latents `[T, L]`.
    pub experts: Tensor<2>,
    /// At the output of the dense block `[T, H]`.
    pub dense: Tensor<2>,
    /// At the input, around the blocks `[T, H]`; where there are several residual streams, at those after the half.
    pub around: Tensor<2>,
}

impl RouterLayer {
    /// What the router reads of `x [T, H]`, given what the experts read.
    pub fn input(&self, x: &Tensor<2>, z: &Tensor<2>) -> Tensor<2> {
        self.norm.as_ref().map_or_else(|| z.clone(), |norm| norm.forward(x))
    }
}

impl FfnLayer {
    /// What the router and the dense block read of `x` unless they have norms of their own, and the experts but for a
    /// latent.
    pub fn normed(&self, x: &Tensor<2>) -> Tensor<2> {
        self.norm.as_ref().map_or_else(|| x.clone(), |norm| norm.forward(x))
    }

    /// What the experts read of `z`, as [`normed`](Self::normed) gave it.
    pub fn expert_input(&self, z: &Tensor<2>) -> Tensor<2> {
        self.latent.as_ref().map_or_else(|| z.clone(), |latent| latent.down.forward(z, None))
    }

    /// Gradient with respect to `z` from that of what experts read of it, if they read a latent; and those of what is
    /// trained.
    pub(crate) fn latent_gradient(&self, z: &Tensor<2>, d_read: &Tensor<2>, wanted: Wanted) -> Option<Tensor<2>> {
        self.latent.as_ref()?.down.gradient(|| z.clone(), d_read, Tokens::WAVE, wanted)
    }

    /// Whether something between `z` and what experts read of it is trained.
    pub(crate) fn trains_latent(&self) -> bool {
        self.latent.as_ref().is_some_and(|latent| latent.down.adapter().is_some())
    }

    /// What the dense block reads of `x [T, H]`, given what the experts read.
    pub fn dense_input(&self, x: &Tensor<2>, z: &Tensor<2>) -> Tensor<2> {
        self.apart.as_ref().map_or_else(|| z.clone(), |apart| apart.dense_input.forward(x))
    }

    /// What the output of the blocks on `x` is added to, a bias on it included.
    pub(crate) fn carried(&self, x: &Tensor<2>) -> Tensor<2> {
        let carried = self.carry.map_or_else(|| x.clone(), |carry| scaled(self.normed(x), carry));
        match &self.bias {
            Some(bias) => carried + bias.clone().unsqueeze::<2>(), // [T, H]
            None => carried,
        }
    }

    /// Whether the output is the input plus the sum of the blocks.
    fn is_plain(&self) -> bool {
        self.streams.is_none()
            && self.output_norm.is_none()
            && self.apart.is_none()
            && self.residual == 1.0
            && self.scale == 1.0
            && self.carry.is_none()
            && self.bias.is_none()
    }

    /// Whether one of its norms is trained.
    pub(crate) fn trains_norms(&self) -> bool {
        let apart = self.apart.iter().flat_map(|a| [&a.dense_input, &a.dense_output, &a.experts_output]);
        let router = self.router.iter().filter_map(|router| router.norm.as_ref());
        self.norm.iter().chain(&self.output_norm).chain(apart).chain(router).any(Norm::is_trained)
    }

    /// What outputs of the blocks on `x` are added to, for [`output`](Self::output).
    pub(crate) fn sums(&self, x: &Tensor<2>) -> BlockSums {
        let zeros = |width: usize| RowAccumulator::zeros(x.dims()[0], width, &x.device());
        let hidden = x.dims()[1] / self.streams.as_ref().map_or(1, |streams| streams.count);
        if self.shortcut {
            let (experts, dense) = (zeros(hidden), Some(RowAccumulator::from_tensor(x.clone())));
            return BlockSums { experts, latent: None, dense };
        }
        BlockSums {
            experts: if self.is_plain() { RowAccumulator::from_tensor(x.clone()) } else { zeros(hidden) },
            latent: self.latent.as_ref().map(|latent| zeros(latent.up.dims()[1])),
            dense: self.apart.is_some().then(|| zeros(hidden)),
        }
    }

    /// What it does with several residual streams `x`, and what its norm reads of them.
    pub(crate) fn open(&self, x: &Tensor<2>) -> (Option<Mixing>, Tensor<2>) {
        match &self.streams {
            Some(streams) => {
                let (mixing, read) = streams.open(x);
                (Some(mixing), read)
            }
            None => (None, x.clone()),
        }
    }

    /// `x` plus what the blocks give, and the sums that a backward pass through norms after the blocks needs, that of
    /// the latents last. `mixing` as [`open`](Self::open) gave it.
    pub(crate) fn output(
        &self,
        x: &Tensor<2>,
        mixing: Option<&Mixing>,
        mut sums: BlockSums,
    ) -> (Tensor<2>, Vec<Tensor<2>>) {
        if let (Some(streams), Some(mixing)) = (&self.streams, mixing) {
            let half = sums.experts.into_tensor();
            return (streams.close(x, mixing, &half), vec![half]);
        }
        if self.shortcut {
            let stream = sums.dense.take().map_or_else(|| x.clone(), RowAccumulator::into_tensor);
            return (Tensor::cat(vec![stream, sums.experts.into_tensor()], 1), Vec::new());
        }
        let latents = sums.latent.take().map(RowAccumulator::into_tensor);
        if let (Some(latent), Some(latents)) = (&self.latent, &latents) {
            sums.experts.add(&latent.up.forward(latents, None));
        }
        if self.is_plain() {
            return (sums.experts.into_tensor(), latents.into_iter().collect());
        }
        let kept: Vec<Tensor<2>> =
            std::iter::once(sums.experts).chain(sums.dense).map(RowAccumulator::into_tensor).collect();
        let out = self.output_again(x, &kept);
        let after = self.output_norm.is_some() || self.apart.is_some();
        let kept = if after { kept } else { Vec::new() };
        (out, kept.into_iter().chain(latents).collect())
    }

    /// The output again from the sums of the blocks, of a half with norms after them.
    pub(crate) fn output_again(&self, x: &Tensor<2>, sums: &[Tensor<2>]) -> Tensor<2> {
        let total = self.total(sums);
        let half = match &self.output_norm {
            Some(norm) => norm.forward(&total),
            None => total,
        };
        let mut out = RowAccumulator::from_tensor(scaled(half, self.residual));
        out.add(&self.carried(x));
        scaled(out.into_tensor(), self.scale)
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
    pub(crate) fn block_gradients(
        &self,
        dy: Tensor<2>,
        mixing: Option<&Mixing>,
        sums: &[Tensor<2>],
        parameters: bool,
    ) -> BlockGradients {
        if let (Some(streams), Some(mixing)) = (&self.streams, mixing) {
            let half = streams.half_gradient(mixing, &dy);
            return BlockGradients { experts: half.clone(), dense: half, around: dy };
        }
        if self.shortcut {
            let hidden = dy.dims()[1] / 2;
            let (stream, experts) = (dy.clone().narrow(1, 0, hidden), dy.narrow(1, hidden, hidden));
            return BlockGradients { experts, dense: stream.clone(), around: stream };
        }
        let around = scaled(dy, self.scale);
        let half = scaled(around.clone(), self.residual);
        let (sums, latents) = match (&self.latent, sums) {
            (Some(_), [sums @ .., latents]) => (sums, Some(latents)),
            _ => (sums, None),
        };
        let total = match &self.output_norm {
            Some(norm) => norm.backward(&self.total(sums), &half, parameters),
            None => half,
        };
        let mut gradients = match (&self.apart, sums) {
            (Some(apart), [experts, dense]) => BlockGradients {
                experts: apart.experts_output.backward(experts, &total, parameters),
                dense: apart.dense_output.backward(dense, &total, parameters),
                around,
            },
            _ => BlockGradients { experts: total.clone(), dense: total, around },
        };
        if let (Some(latent), Some(latents)) = (&self.latent, latents) {
            let wanted = Wanted { input: true, parameters };
            let through = latent.up.gradient(|| latents.clone(), &gradients.experts, Tokens::WAVE, wanted);
            gradients.experts = through.expect("wanted");
        }
        gradients
    }

    /// Gradient with respect to `x` through the blocks, from those at what the experts read, at what the dense block
    /// reads where it is apart and at what the router reads where it has a norm; with `parameters`, also those of what
    /// is trained of the norms.
    pub(crate) fn input_gradient(
        &self,
        x: &Tensor<2>,
        dz: RowAccumulator,
        [d_dense, d_router]: [Option<Tensor<2>>; 2],
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
        dx.into_tensor()
    }
}
