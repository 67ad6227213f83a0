//! Linear attention by a delta rule, with its norm and residual: gated DeltaNet (arXiv 2412.06464) of Qwen3-Next and
//! Qwen3.5, whose heads forget, and Kimi delta attention (arXiv 2510.26692) of Kimi-Linear and Bailing hybrid, whose
//! channels do.
//!
//! Projections give queries, keys and values, a gate on the output, and what decays and what is written. Queries, keys
//! and values go through a short causal convolution and SiLU; queries and keys are divided by their length. The rule
//! itself is [`delta_rule`]. Its output is normed per head and multiplied by an activation of the gate.

mod projections;

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

pub use projections::{ApartProjections, DeltaProjections, WideProjection};

use super::{
    Linear, Norm,
    convolved_heads::{ConvolvedHeads, HeadColumns},
    softplus,
};
use crate::{
    adapters::Wanted,
    host::{self, HostView},
    kernels::{
        convolution::advance_history,
        delta::{DeltaInput, DeltaShape, delta_rule, delta_rule_backward},
        math,
        rows::RowAccumulator,
    },
};

/// Linear attention by a delta rule, with its norm.
#[derive(Clone, Debug)]
pub struct DeltaLayer {
    /// Input norm.
    pub norm: Norm,
    /// Projections of the normed input.
    pub inputs: DeltaProjections,
    /// Taps of the convolution of queries, keys and values `[K, C]`, `C = 2 key_heads * D_k + value_heads * D_v`.
    pub taps: Arc<[f32]>,
    /// Rate of the decay per head `[value_heads]`, `e^{A_log}`.
    pub rate: Arc<[f32]>,
    /// Added to the projected decays `[decays]`.
    pub rate_bias: Arc<[f32]>,
    /// Least logarithm of a decay, where decays are sigmoids between it and 0.
    pub lower_bound: Option<f32>,
    /// What the gate goes through.
    pub gate: GateActivation,
    /// Norm of every head of the output `[D_v]`.
    pub output_norm: Norm,
    /// Output projection `[H, value_heads * D_v]`.
    pub output: Linear,
    /// Numbers and widths of the heads.
    pub shape: DeltaShape,
}

/// What a gate on the output goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateActivation {
    /// `x sigmoid(x)`.
    Silu,
    /// `sigmoid(x)`.
    Sigmoid,
}

impl GateActivation {
    fn value(self, x: f32) -> f32 {
        match self {
            Self::Silu => math::silu(x),
            Self::Sigmoid => math::sigmoid(x),
        }
    }

    fn derivative(self, x: f32) -> f32 {
        let s = math::sigmoid(x);
        match self {
            Self::Silu => math::silu_derivative(x, s),
            Self::Sigmoid => s * (1.0 - s),
        }
    }
}

/// What the projections give, row-major: all that the rest is computed from.
#[derive(Clone, Debug)]
pub struct DeltaTape {
    /// `[T, C]`: queries, keys, values.
    qkv: Vec<f32>,
    /// `[T, value_heads * D_v]`, before its activation.
    gate: Vec<f32>,
    /// `[T, value_heads]`, before the sigmoid.
    beta: Vec<f32>,
    /// `[T, decays]`, before the bias.
    decay: Vec<f32>,
}

/// What generation keeps of a sequence, however long it is.
#[derive(Clone, Debug)]
pub struct DeltaState {
    /// The last `K - 1` rows that went into the convolution.
    history: Vec<f32>,
    /// `[value_heads, D_k, D_v]`.
    state: Vec<f32>,
}

/// What the rule is given, and what that was made of.
struct Ready {
    heads: ConvolvedHeads,
    g: Vec<f32>,
    beta: Vec<f32>,
}

impl Ready {
    fn input(&self) -> DeltaInput<'_> {
        let ConvolvedHeads { q, k, v, .. } = &self.heads;
        DeltaInput { q, k, v, g: &self.g, beta: &self.beta }
    }
}

/// Widths of the columns of queries (and of keys), of values, and of all three.
fn widths(shape: &DeltaShape) -> [usize; 3] {
    let (keys, values) = (shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim);
    [keys, values, 2 * keys + values]
}

impl DeltaLayer {
    fn channels(&self) -> usize {
        widths(&self.shape)[2]
    }

    fn columns(&self) -> HeadColumns {
        let [keys, values, _] = widths(&self.shape);
        HeadColumns { keys, values, key_dim: self.shape.key_dim }
    }

    /// The projections of `x [T, H]`.
    pub fn project(&self, x: &Tensor<2>) -> DeltaTape {
        self.inputs.forward(&self.norm.forward(x), &self.shape)
    }

    /// The rate of the head of each decay, and what is added to its logit, decay by decay.
    fn rates(&self) -> impl Iterator<Item = (f32, f32)> + Clone {
        let per_head = self.shape.decays() / self.shape.value_heads;
        let of_head = self.rate.iter().flat_map(move |rate| std::iter::repeat_n(*rate, per_head));
        of_head.zip(self.rate_bias.iter().copied()).cycle()
    }

    fn ready(&self, tape: &DeltaTape, sequences: &[Range<usize>], history: Option<&[Vec<f32>]>) -> Ready {
        let heads = ConvolvedHeads::new(&tape.qkv, &self.taps, &self.columns(), sequences, history);
        let logits = tape.decay.iter().zip(self.rates());
        let g = match self.lower_bound {
            Some(bound) => logits.map(|(a, (rate, bias))| bound * math::sigmoid(rate * (a + bias))).collect(),
            None => logits.map(|(a, (rate, bias))| -rate * softplus(a + bias)).collect(),
        };
        let beta = tape.beta.iter().map(|b| math::sigmoid(*b)).collect();
        Ready { heads, g, beta }
    }

    /// Norm of every head of `core [T, value_heads * D_v]`, as rows `[T * value_heads, D_v]`.
    fn heads(&self, core: Vec<f32>, device: &burn::tensor::Device) -> Tensor<2> {
        let rows = core.len() / self.shape.value_dim;
        host::from_vec(core, [rows, self.shape.value_dim], device)
    }

    /// `norm(core)` times the activated gate as `[T, value_heads * D_v]`, and `norm(core)`.
    fn gated(&self, core: &Tensor<2>, gate: &[f32]) -> (Tensor<2>, Vec<f32>) {
        let normed = host::into_vec(self.output_norm.forward(core));
        let values = normed.iter().zip(gate).map(|(x, gate)| x * self.gate.value(*gate)).collect();
        let columns = self.shape.value_heads * self.shape.value_dim;
        (host::from_vec(values, [normed.len() / columns, columns], &core.device()), normed)
    }

    /// `x + output(...)`, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &DeltaTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let ready = self.ready(tape, sequences, None);
        let mut states = vec![vec![0.0; self.shape.state_len()]; sequences.len()];
        let core = delta_rule(&ready.input(), sequences, &self.shape, &mut states);
        self.residual(x, &self.gated(&self.heads(core, &x.device()), &tape.gate).0)
    }

    fn residual(&self, x: &Tensor<2>, gated: &Tensor<2>) -> Tensor<2> {
        let mut sum = RowAccumulator::from_tensor(self.output.forward(gated));
        sum.add(x);
        sum.into_tensor()
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &DeltaTape,
        sequences: &[Range<usize>],
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let device = x.device();
        let ready = self.ready(tape, sequences, None);
        let mut states = vec![vec![0.0; self.shape.state_len()]; sequences.len()];
        let core = self.heads(delta_rule(&ready.input(), sequences, &self.shape, &mut states), &device);
        drop(states);
        let (gated, normed) = self.gated(&core, &tape.gate);
        let d_gated = self.output.backward(|| gated, &dy, Wanted { input: true, ..wanted })?;
        let d_gated = HostView::new(&d_gated);
        let d_gated = d_gated.as_slice();
        let gates = d_gated.iter().zip(&normed).zip(&tape.gate);
        let d_gate = gates.map(|((d, x), gate)| d * x * self.gate.derivative(*gate)).collect();
        let d_normed = d_gated.iter().zip(&tape.gate).map(|(d, gate)| d * self.gate.value(*gate)).collect();
        let d_core = self.output_norm.backward(&core, &self.heads(d_normed, &device), wanted.parameters);
        let d_core = HostView::new(&d_core);
        let d = delta_rule_backward(&ready.input(), sequences, &self.shape, d_core.as_slice());
        let d_tape = DeltaTape {
            qkv: ready.heads.backward([&d.q, &d.k, &d.v], &self.taps, &self.columns(), sequences),
            gate: d_gate,
            beta: d.beta.iter().zip(&ready.beta).map(|(d, b)| d * b * (1.0 - b)).collect(),
            decay: self.decay_backward(&d.g, &tape.decay),
        };
        let z = || self.norm.forward(x);
        let wanted_z = Wanted { input: wanted.input || self.norm.is_trained(), ..wanted };
        let dz = self.inputs.backward(&z, &d_tape, &self.shape, wanted_z, &device)?;
        let dx = self.norm.backward(x, &dz, wanted.parameters);
        wanted.input.then(|| {
            let mut dx = RowAccumulator::from_tensor(dx);
            dx.add(&dy);
            dx.into_tensor()
        })
    }

    /// From gradients at the logarithms of the decays to those at their logits.
    fn decay_backward(&self, d: &[f32], logits: &[f32]) -> Vec<f32> {
        let all = d.iter().zip(logits).zip(self.rates());
        match self.lower_bound {
            Some(bound) => all
                .map(|((d, a), (rate, bias))| {
                    let s = math::sigmoid(rate * (a + bias));
                    d * bound * s * (1.0 - s) * rate
                })
                .collect(),
            None => all.map(|((d, a), (rate, bias))| -rate * d * math::sigmoid(a + bias)).collect(),
        }
    }

    /// The state before the first token of a sequence.
    pub fn start(&self) -> DeltaState {
        let kernel = self.taps.len() / self.channels();
        DeltaState { history: vec![0.0; (kernel - 1) * self.channels()], state: vec![0.0; self.shape.state_len()] }
    }

    /// `x + output(...)` of further tokens `x [n, H]` of some sequences, whose states move on.
    pub fn step(&self, x: &Tensor<2>, sequences: &[Range<usize>], states: &mut [&mut DeltaState]) -> Tensor<2> {
        let tape = self.project(x);
        let mut history: Vec<Vec<f32>> = states.iter_mut().map(|state| std::mem::take(&mut state.history)).collect();
        let mut inner: Vec<Vec<f32>> = states.iter_mut().map(|state| std::mem::take(&mut state.state)).collect();
        let ready = self.ready(&tape, sequences, Some(&history));
        let core = delta_rule(&ready.input(), sequences, &self.shape, &mut inner);
        let channels = self.channels();
        for (history, rows) in history.iter_mut().zip(sequences) {
            advance_history(history, &tape.qkv[rows.start * channels..rows.end * channels]);
        }
        for ((state, history), inner) in states.iter_mut().zip(history).zip(inner) {
            (state.history, state.state) = (history, inner);
        }
        self.residual(x, &self.gated(&self.heads(core, &x.device()), &tape.gate).0)
    }
}
