//! Lightning attention (arXiv 2401.04658), the linear attention of MiniMax-Text-01 and MiniMax-M1, with its norm and
//! residual.
//!
//! One projection of the normed input gives queries, keys and values, head by head, which go through SiLU. Per head,
//! `S_t = e^{-r} S_{t-1} + k_t v_t^T` and `o_t = S_t^T q_t`: the recurrence of a state space layer with steps of 1
//! ([`state_space`]). Its output is normed over all heads and multiplied by the sigmoid of a gate.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::{Linear, Norm, scaled, sum_of};
use crate::{
    adapters::Wanted,
    host::{self, HostView},
    kernels::{
        math,
        rows::RowAccumulator,
        ssd::{SsdInput, SsdShape, state_space, state_space_backward},
    },
};

/// Lightning attention with its norm. `C = heads * D`, the width of queries, of keys and of values.
#[derive(Clone, Debug)]
pub struct LightningLayer {
    /// Input norm.
    pub norm: Norm,
    /// Queries, keys and values, head by head `[3 C, H]`.
    pub qkv: Linear,
    /// Gate on the output `[C, H]`.
    pub gate: Linear,
    /// Norm of the output `[C]`.
    pub output_norm: Norm,
    /// Output projection `[H, C]`.
    pub output: Linear,
    /// Minus the rate of every head `[heads]`.
    pub rates: Arc<[f32]>,
    /// Width of a head, D.
    pub head_dim: usize,
    /// Factor on the output.
    pub residual: f32,
    /// Factor on what that is added to: the normed input, where it is that, else the input itself.
    pub carry: Option<f32>,
}

/// What the projections give, row-major.
#[derive(Clone, Debug)]
pub struct LightningTape {
    /// `[T, 3 C]`, before SiLU.
    qkv: Vec<f32>,
    /// `[T, C]`, before the sigmoid.
    gate: Vec<f32>,
}

/// What generation keeps of a sequence: `[heads, D, D]`.
pub type LightningState = Vec<f32>;

/// Queries, keys and values `[T, C]` each, and the steps.
struct Ready {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    steps: Vec<f32>,
}

impl LightningLayer {
    fn shape(&self) -> SsdShape {
        let heads = self.rates.len();
        SsdShape { heads, head_dim: self.head_dim, groups: heads, state: self.head_dim }
    }

    fn width(&self) -> usize {
        self.rates.len() * self.head_dim
    }

    /// The projections of `x [T, H]`.
    pub fn project(&self, x: &Tensor<2>) -> LightningTape {
        let z = self.norm.forward(x);
        LightningTape { qkv: host::into_vec(self.qkv.forward(&z)), gate: host::into_vec(self.gate.forward(&z)) }
    }

    fn ready(&self, tape: &LightningTape) -> Ready {
        let d = self.head_dim;
        let part = |which: usize| -> Vec<f32> {
            let heads = tape.qkv.chunks_exact(3 * d);
            heads.flat_map(|head| head[which * d..(which + 1) * d].iter().map(|x| math::silu(*x))).collect()
        };
        let tokens = tape.gate.len() / self.width();
        Ready { q: part(0), k: part(1), v: part(2), steps: vec![1.0; tokens * self.rates.len()] }
    }

    fn input<'a>(&'a self, ready: &'a Ready) -> SsdInput<'a> {
        SsdInput { x: &ready.v, b: &ready.k, c: &ready.q, steps: &ready.steps, rates: &self.rates }
    }

    fn core(&self, ready: &Ready, sequences: &[Range<usize>], states: &mut [Vec<f32>], x: &Tensor<2>) -> Tensor<2> {
        let core = state_space(&self.input(ready), sequences, &self.shape(), states);
        host::from_vec(core, [x.dims()[0], self.width()], &x.device())
    }

    /// `norm(core) * sigmoid(gate)`, and `norm(core)`.
    fn gated(&self, core: &Tensor<2>, gate: &[f32]) -> (Tensor<2>, Vec<f32>) {
        let normed = host::into_vec(self.output_norm.forward(core));
        let gated = normed.iter().zip(gate).map(|(x, gate)| x * math::sigmoid(*gate)).collect();
        (host::from_vec(gated, core.dims(), &core.device()), normed)
    }

    fn finish(&self, x: &Tensor<2>, gated: &Tensor<2>) -> Tensor<2> {
        let mut sum = RowAccumulator::from_tensor(scaled(self.output.forward(gated), self.residual));
        match self.carry {
            Some(carry) => sum.add(&scaled(self.norm.forward(x), carry)),
            None => sum.add(x),
        }
        sum.into_tensor()
    }

    fn zero_states(&self, sequences: usize) -> Vec<Vec<f32>> {
        vec![vec![0.0; self.shape().state_len()]; sequences]
    }

    /// The layer's output, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &LightningTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let core = self.core(&self.ready(tape), sequences, &mut self.zero_states(sequences.len()), x);
        self.finish(x, &self.gated(&core, &tape.gate).0)
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &LightningTape,
        sequences: &[Range<usize>],
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let (tokens, width, device) = (x.dims()[0], self.width(), x.device());
        let ready = self.ready(tape);
        let core = self.core(&ready, sequences, &mut self.zero_states(sequences.len()), x);
        let (gated, normed) = self.gated(&core, &tape.gate);
        let d_output = scaled(dy.clone(), self.residual);
        let d_gated = self.output.backward(|| gated, &d_output, Wanted { input: true, ..wanted })?;
        let d_gated = HostView::new(&d_gated);
        let d_gated = d_gated.as_slice();
        let gates = d_gated.iter().zip(&normed).zip(&tape.gate);
        let d_gate = gates.map(|((d, x), gate)| {
            let s = math::sigmoid(*gate);
            d * x * s * (1.0 - s)
        });
        let d_gate = d_gate.collect();
        let d_normed = d_gated.iter().zip(&tape.gate).map(|(d, gate)| d * math::sigmoid(*gate)).collect();
        let d_normed = host::from_vec(d_normed, [tokens, width], &device);
        let d_core = self.output_norm.backward(&core, &d_normed, wanted.parameters);
        let d_core = HostView::new(&d_core);
        let d = state_space_backward(&self.input(&ready), sequences, &self.shape(), d_core.as_slice());
        let mut d_qkv = Vec::with_capacity(3 * tokens * width);
        for head in 0..tokens * self.rates.len() {
            let of = head * self.head_dim..(head + 1) * self.head_dim;
            [&d.c, &d.b, &d.x].into_iter().for_each(|part| d_qkv.extend_from_slice(&part[of.clone()]));
        }
        for (d, x) in d_qkv.iter_mut().zip(&tape.qkv) {
            *d *= math::silu_derivative(*x, math::sigmoid(*x));
        }
        let z = || self.norm.forward(x);
        let wanted_z = Wanted { input: wanted.input || self.norm.is_trained(), ..wanted };
        let tensor = |values: Vec<f32>, columns: usize| host::from_vec(values, [tokens, columns], &device);
        let carried = self.carry.filter(|_| wanted_z.input).map(|carry| scaled(dy.clone(), carry));
        let dz = sum_of([
            self.qkv.backward(z, &tensor(d_qkv, 3 * width), wanted_z),
            self.gate.backward(z, &tensor(d_gate, width), wanted_z),
            carried,
        ])?;
        let dx = self.norm.backward(x, &dz, wanted.parameters);
        wanted.input.then(|| {
            let mut dx = RowAccumulator::from_tensor(dx);
            if self.carry.is_none() {
                dx.add(&dy);
            }
            dx.into_tensor()
        })
    }

    /// The state before the first token of a sequence.
    pub fn start(&self) -> LightningState {
        vec![0.0; self.shape().state_len()]
    }

    /// The layer's output on further tokens `x [n, H]` of some sequences, whose states move on.
    pub fn step(&self, x: &Tensor<2>, sequences: &[Range<usize>], states: &mut [LightningState]) -> Tensor<2> {
        let tape = self.project(x);
        let core = self.core(&self.ready(&tape), sequences, states, x);
        self.finish(x, &self.gated(&core, &tape.gate).0)
    }
}
