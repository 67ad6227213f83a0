//! Kimi delta attention (arXiv 2510.26692), the linear attention of Kimi-Linear and Bailing hybrid, with its norm and
//! residual: a delta rule that forgets by channel.
//!
//! Projections give queries, keys and values, logits of the decay of every channel, a gate on the output, and per head
//! what is written. Queries, keys and values go through a short causal convolution and SiLU. The rule itself is
//! [`channel_delta_rule`]. Its output is normed per head and multiplied by `sigmoid(gate)`.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::{
    DeltaState, Linear, Norm,
    convolved_heads::{ConvolvedHeads, HeadColumns},
    softplus, sum_of,
};
use crate::{
    adapters::Wanted,
    host::{self, HostView},
    kernels::{
        channel_delta::{ChannelDeltaInput, ChannelDeltaShape, channel_delta_rule, channel_delta_rule_backward},
        convolution::advance_history,
        math,
        rows::RowAccumulator,
    },
};

/// Kimi delta attention with its norm. `C = heads * D`, the width of queries, of keys and of values.
#[derive(Clone, Debug)]
pub struct ChannelDeltaLayer {
    /// Input norm.
    pub norm: Norm,
    /// Projections of queries, keys and values `[C, H]`.
    pub qkv: Box<[Linear; 3]>,
    /// Taps of the convolution of queries, keys and values `[K, 3 C]`.
    pub taps: Arc<[f32]>,
    /// Projection of the logits of the decay `[C, H]`.
    pub decay: WideProjection,
    /// Rate of the decay per head `[heads]`, `e^{A_log}`.
    pub rate: Arc<[f32]>,
    /// Added to the logits of the decay `[C]`.
    pub rate_bias: Arc<[f32]>,
    /// Least logarithm of a decay, where decays are sigmoids between it and 0.
    pub lower_bound: Option<f32>,
    /// How much every head writes `[heads, H]`.
    pub beta: Linear,
    /// Projection of the gate on the output `[C, H]`.
    pub gate: WideProjection,
    /// Norm of every head of the output `[D]`.
    pub output_norm: Norm,
    /// Output projection `[H, C]`.
    pub output: Linear,
    /// Numbers and widths of the heads.
    pub shape: ChannelDeltaShape,
}

/// A projection in one matrix, or through a narrow one.
#[derive(Clone, Debug)]
pub enum WideProjection {
    /// In one.
    Full(Box<Linear>),
    /// Down and up.
    LowRank(Box<[Linear; 2]>),
}

/// What the projections give, row-major: all that the rest is computed from.
#[derive(Clone, Debug)]
pub struct ChannelDeltaTape {
    /// `[T, 3 C]`: queries, keys, values.
    qkv: Vec<f32>,
    /// `[T, C]`, before the bias.
    decay: Vec<f32>,
    /// `[T, heads]`, before the sigmoid.
    beta: Vec<f32>,
    /// `[T, C]`, before the sigmoid.
    gate: Vec<f32>,
}

/// What the rule is given.
struct Ready {
    heads: ConvolvedHeads,
    g: Vec<f32>,
    beta: Vec<f32>,
}

impl Ready {
    fn input(&self) -> ChannelDeltaInput<'_> {
        let ConvolvedHeads { q, k, v, .. } = &self.heads;
        ChannelDeltaInput { q, k, v, g: &self.g, beta: &self.beta }
    }
}

impl WideProjection {
    fn forward(&self, z: &Tensor<2>) -> Tensor<2> {
        match self {
            Self::Full(map) => map.forward(z),
            Self::LowRank(maps) => maps[1].forward(&maps[0].forward(z)),
        }
    }

    fn backward(&self, z: &dyn Fn() -> Tensor<2>, dy: &Tensor<2>, wanted: Wanted) -> Option<Tensor<2>> {
        match self {
            Self::Full(map) => map.backward(z, dy, wanted),
            Self::LowRank(maps) => {
                let [down, up] = &**maps;
                let through = Wanted { input: true, ..wanted };
                let d = up.backward(|| down.forward(&z()), dy, through)?;
                down.backward(z, &d, wanted)
            }
        }
    }
}

impl ChannelDeltaLayer {
    fn columns(&self) -> HeadColumns {
        let ChannelDeltaShape { heads, key_dim, value_dim } = self.shape;
        HeadColumns { keys: heads * key_dim, values: heads * value_dim, key_dim }
    }

    /// The projections of `x [T, H]`.
    pub fn project(&self, x: &Tensor<2>) -> ChannelDeltaTape {
        let z = self.norm.forward(x);
        let qkv = self.qkv.iter().map(|map| map.forward(&z)).collect();
        ChannelDeltaTape {
            qkv: host::into_vec(Tensor::cat(qkv, 1)),
            decay: host::into_vec(self.decay.forward(&z)),
            beta: host::into_vec(self.beta.forward(&z)),
            gate: host::into_vec(self.gate.forward(&z)),
        }
    }

    /// The rate of each channel's head, and what is added to its logit, channel by channel.
    fn rates(&self) -> impl Iterator<Item = (f32, f32)> + Clone {
        let of_head = self.rate.iter().flat_map(|rate| std::iter::repeat_n(*rate, self.shape.key_dim));
        of_head.zip(self.rate_bias.iter().copied()).cycle()
    }

    fn ready(&self, tape: &ChannelDeltaTape, sequences: &[Range<usize>], history: Option<&[Vec<f32>]>) -> Ready {
        let heads = ConvolvedHeads::new(&tape.qkv, &self.taps, &self.columns(), sequences, history);
        let logits = tape.decay.iter().zip(self.rates());
        let g = match self.lower_bound {
            Some(bound) => logits.map(|(a, (rate, bias))| bound * math::sigmoid(rate * (a + bias))).collect(),
            None => logits.map(|(a, (rate, bias))| -rate * softplus(a + bias)).collect(),
        };
        Ready { heads, g, beta: tape.beta.iter().map(|b| math::sigmoid(*b)).collect() }
    }

    /// Heads of `[T, C]` as rows `[T * heads, D]`.
    fn heads(&self, values: Vec<f32>, device: &burn::tensor::Device) -> Tensor<2> {
        let width = self.shape.value_dim;
        let rows = values.len() / width;
        host::from_vec(values, [rows, width], device)
    }

    /// `norm(core) * sigmoid(gate)` as `[T, C]`, and `norm(core)`.
    fn gated(&self, core: &Tensor<2>, gate: &[f32]) -> (Tensor<2>, Vec<f32>) {
        let normed = host::into_vec(self.output_norm.forward(core));
        let values = normed.iter().zip(gate).map(|(x, gate)| x * math::sigmoid(*gate)).collect();
        let columns = self.columns().values;
        (host::from_vec(values, [normed.len() / columns, columns], &core.device()), normed)
    }

    fn residual(&self, x: &Tensor<2>, gated: &Tensor<2>) -> Tensor<2> {
        let mut sum = RowAccumulator::from_tensor(self.output.forward(gated));
        sum.add(x);
        sum.into_tensor()
    }

    /// `x + output(...)`, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &ChannelDeltaTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let ready = self.ready(tape, sequences, None);
        let mut states = vec![vec![0.0; self.shape.state_len()]; sequences.len()];
        let core = channel_delta_rule(&ready.input(), sequences, &self.shape, &mut states);
        self.residual(x, &self.gated(&self.heads(core, &x.device()), &tape.gate).0)
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &ChannelDeltaTape,
        sequences: &[Range<usize>],
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let device = x.device();
        let tokens = x.dims()[0];
        let ready = self.ready(tape, sequences, None);
        let mut states = vec![vec![0.0; self.shape.state_len()]; sequences.len()];
        let core = channel_delta_rule(&ready.input(), sequences, &self.shape, &mut states);
        let core = self.heads(core, &device);
        drop(states);
        let (gated, normed) = self.gated(&core, &tape.gate);
        let d_gated = self.output.backward(|| gated, &dy, Wanted { input: true, ..wanted })?;
        let d_gated = HostView::new(&d_gated);
        let d_gated = d_gated.as_slice();
        let d_gate = d_gated.iter().zip(&normed).zip(&tape.gate).map(|((d, x), gate)| {
            let s = math::sigmoid(*gate);
            d * x * s * (1.0 - s)
        });
        let d_gate: Vec<f32> = d_gate.collect();
        let d_normed = d_gated.iter().zip(&tape.gate).map(|(d, gate)| d * math::sigmoid(*gate)).collect();
        let d_core = self.output_norm.backward(&core, &self.heads(d_normed, &device), wanted.parameters);
        let d_core = HostView::new(&d_core);
        let d = channel_delta_rule_backward(&ready.input(), sequences, &self.shape, d_core.as_slice());
        let columns = self.columns();
        let d_qkv = ready.heads.backward([&d.q, &d.k, &d.v], &self.taps, &columns, sequences);
        let logits = d.g.iter().zip(&tape.decay).zip(self.rates());
        let d_decay: Vec<f32> = match self.lower_bound {
            Some(bound) => logits
                .map(|((d, a), (rate, bias))| {
                    let s = math::sigmoid(rate * (a + bias));
                    d * bound * s * (1.0 - s) * rate
                })
                .collect(),
            None => logits.map(|((d, a), (rate, bias))| -rate * d * math::sigmoid(a + bias)).collect(),
        };
        let d_beta: Vec<f32> = d.beta.iter().zip(&ready.beta).map(|(d, b)| d * b * (1.0 - b)).collect();
        let z = || self.norm.forward(x);
        let wanted_z = Wanted { input: wanted.input || self.norm.is_trained(), ..wanted };
        let tensor = |values: Vec<f32>, columns: usize| host::from_vec(values, [tokens, columns], &device);
        let d_qkv = tensor(d_qkv, columns.all());
        let part = |i: usize| {
            let width = if i == 2 { columns.values } else { columns.keys };
            d_qkv.clone().narrow(1, i * columns.keys, width)
        };
        let through_qkv = (0..3).map(|i| self.qkv[i].backward(z, &part(i), wanted_z));
        let others = [
            self.decay.backward(&z, &tensor(d_decay, columns.keys), wanted_z),
            self.beta.backward(z, &tensor(d_beta, self.shape.heads), wanted_z),
            self.gate.backward(&z, &tensor(d_gate, columns.values), wanted_z),
        ];
        let dz = sum_of(through_qkv.chain(others))?;
        let dx = self.norm.backward(x, &dz, wanted.parameters);
        wanted.input.then(|| {
            let mut dx = RowAccumulator::from_tensor(dx);
            dx.add(&dy);
            dx.into_tensor()
        })
    }

    /// The state before the first token of a sequence.
    pub fn start(&self) -> DeltaState {
        DeltaState {
            history: vec![0.0; self.taps.len() - self.columns().all()],
            state: vec![0.0; self.shape.state_len()],
        }
    }

    /// `x + output(...)` of further tokens `x [n, H]` of some sequences, whose states move on.
    pub fn step(&self, x: &Tensor<2>, sequences: &[Range<usize>], states: &mut [&mut DeltaState]) -> Tensor<2> {
        let tape = self.project(x);
        let mut history: Vec<Vec<f32>> = states.iter_mut().map(|state| std::mem::take(&mut state.history)).collect();
        let mut inner: Vec<Vec<f32>> = states.iter_mut().map(|state| std::mem::take(&mut state.state)).collect();
        let ready = self.ready(&tape, sequences, Some(&history));
        let core = channel_delta_rule(&ready.input(), sequences, &self.shape, &mut inner);
        let all = self.columns().all();
        for (history, rows) in history.iter_mut().zip(sequences) {
            advance_history(history, &tape.qkv[rows.start * all..rows.end * all]);
        }
        for ((state, history), inner) in states.iter_mut().zip(history).zip(inner) {
            (state.history, state.state) = (history, inner);
        }
        self.residual(x, &self.gated(&self.heads(core, &x.device()), &tape.gate).0)
    }
}
