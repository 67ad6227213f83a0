//! Gated DeltaNet (arXiv 2412.06464), the linear attention of Qwen3-Next and Qwen3.5, with its norm and residual.
//!
//! Projections give queries, keys and values, a gate on the output, and per head what decays and what is written.
//! Queries, keys and values go through a short causal convolution and SiLU; queries and keys are divided by their
//! length. The rule itself is [`delta_rule`]. Its output is normed per head and multiplied by `silu(gate)`.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::{
    Linear, Norm,
    convolved_heads::{ConvolvedHeads, HeadColumns},
    softplus, sum_of,
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

/// Gated DeltaNet with its norm.
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
    /// Added to the projected decay `[value_heads]`.
    pub rate_bias: Arc<[f32]>,
    /// Norm of every head of the output `[D_v]`.
    pub output_norm: Norm,
    /// Output projection `[H, value_heads * D_v]`.
    pub output: Linear,
    /// Numbers and widths of the heads.
    pub shape: DeltaShape,
}

/// Projections of the normed input, in one of the two forms of files.
#[derive(Clone, Debug)]
pub enum DeltaProjections {
    /// Queries, keys and values; gate; what is written; decay.
    Separate(Box<[Linear; 4]>),
    /// Per key head its query, key, values and gates; per key head what is written and the decays of its value heads.
    Grouped(Box<[Linear; 2]>),
}

/// What the projections give, row-major: all that the rest is computed from.
#[derive(Clone, Debug)]
pub struct DeltaTape {
    /// `[T, C]`: queries, keys, values.
    qkv: Vec<f32>,
    /// `[T, value_heads * D_v]`.
    gate: Vec<f32>,
    /// `[T, value_heads]`, before the sigmoid.
    beta: Vec<f32>,
    /// `[T, value_heads]`, before the bias and softplus.
    decay: Vec<f32>,
}

/// What generation keeps of a sequence, however long it is.
#[derive(Clone, Debug)]
pub struct DeltaState {
    /// The last `K - 1` rows that went into the convolution.
    pub(super) history: Vec<f32>,
    /// `[value_heads, D_k, D_v]`.
    pub(super) state: Vec<f32>,
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

impl DeltaProjections {
    fn forward(&self, z: &Tensor<2>, shape: &DeltaShape) -> DeltaTape {
        let values = |linear: &Linear| host::into_vec(linear.forward(z));
        match self {
            Self::Separate(maps) => {
                let [qkv, gate, beta, decay] = &**maps;
                DeltaTape { qkv: values(qkv), gate: values(gate), beta: values(beta), decay: values(decay) }
            }
            Self::Grouped(maps) => {
                let (both, small) = (values(&maps[0]), values(&maps[1]));
                let (columns, small_columns) = (grouped_columns(shape), grouped_small_columns(shape));
                let pick = |x: &[f32], columns: &[usize], width: usize| -> Vec<f32> {
                    x.chunks_exact(width).flat_map(|row| columns.iter().map(move |c| row[*c])).collect()
                };
                let [_, gate, qkv] = widths(shape);
                let heads = shape.value_heads;
                DeltaTape {
                    qkv: pick(&both, &columns[..qkv], qkv + gate),
                    gate: pick(&both, &columns[qkv..], qkv + gate),
                    beta: pick(&small, &small_columns[..heads], 2 * heads),
                    decay: pick(&small, &small_columns[heads..], 2 * heads),
                }
            }
        }
    }

    /// Gradient with respect to `z`, if it is wanted.
    fn backward(
        &self,
        z: &dyn Fn() -> Tensor<2>,
        d: &DeltaTape,
        shape: &DeltaShape,
        wanted: Wanted,
        device: &burn::tensor::Device,
    ) -> Option<Tensor<2>> {
        let [_, gate, qkv] = widths(shape);
        let heads = shape.value_heads;
        let tokens = d.beta.len() / heads;
        let tensor = |values: Vec<f32>, columns: usize| host::from_vec(values, [tokens, columns], device);
        match self {
            Self::Separate(maps) => {
                let parts = [(&d.qkv, qkv), (&d.gate, gate), (&d.beta, heads), (&d.decay, heads)];
                let parts = maps.iter().zip(parts);
                sum_of(parts.map(|(map, (d, columns))| map.backward(z, &tensor(d.clone(), columns), wanted)))
            }
            Self::Grouped(maps) => {
                let place = |parts: [&[f32]; 2], columns: &[usize]| -> Vec<f32> {
                    let widths = parts.map(|part| part.len() / tokens);
                    let mut out = vec![0.0; tokens * columns.len()];
                    for (t, row) in out.chunks_exact_mut(columns.len()).enumerate() {
                        let first = &parts[0][t * widths[0]..(t + 1) * widths[0]];
                        let second = &parts[1][t * widths[1]..(t + 1) * widths[1]];
                        columns.iter().zip(first.iter().chain(second)).for_each(|(c, d)| row[*c] = *d);
                    }
                    out
                };
                let both = place([&d.qkv, &d.gate], &grouped_columns(shape));
                let small = place([&d.beta, &d.decay], &grouped_small_columns(shape));
                sum_of([
                    maps[0].backward(z, &tensor(both, qkv + gate), wanted),
                    maps[1].backward(z, &tensor(small, 2 * heads), wanted),
                ])
            }
        }
    }
}

/// Columns of queries, keys, values and gates, in this order, in a projection that has them per key head.
fn grouped_columns(shape: &DeltaShape) -> Vec<usize> {
    let (dk, values) = (shape.key_dim, shape.value_heads / shape.key_heads * shape.value_dim);
    let width = 2 * dk + 2 * values;
    let part = |start: usize, len: usize| {
        (0..shape.key_heads).flat_map(move |head| head * width + start..head * width + start + len)
    };
    part(0, dk).chain(part(dk, dk)).chain(part(2 * dk, values)).chain(part(2 * dk + values, values)).collect()
}

/// Columns of what is written and of the decays, in this order, in a projection that has them per key head.
fn grouped_small_columns(shape: &DeltaShape) -> Vec<usize> {
    let each = shape.value_heads / shape.key_heads;
    let part = |start: usize| {
        (0..shape.key_heads).flat_map(move |head| 2 * each * head + start..2 * each * head + start + each)
    };
    part(0).chain(part(each)).collect()
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

    fn ready(&self, tape: &DeltaTape, sequences: &[Range<usize>], history: Option<&[Vec<f32>]>) -> Ready {
        let heads = ConvolvedHeads::new(&tape.qkv, &self.taps, &self.columns(), sequences, history);
        let per_head = self.rate.iter().zip(self.rate_bias.iter()).cycle();
        let g = tape.decay.iter().zip(per_head).map(|(a, (rate, bias))| -rate * softplus(a + bias)).collect();
        let beta = tape.beta.iter().map(|b| math::sigmoid(*b)).collect();
        Ready { heads, g, beta }
    }

    /// Norm of every head of `core [T, value_heads * D_v]`, as rows `[T * value_heads, D_v]`.
    fn heads(&self, core: Vec<f32>, device: &burn::tensor::Device) -> Tensor<2> {
        let rows = core.len() / self.shape.value_dim;
        host::from_vec(core, [rows, self.shape.value_dim], device)
    }

    /// `norm(core) * silu(gate)` as `[T, value_heads * D_v]`, and `norm(core)`.
    fn gated(&self, core: &Tensor<2>, gate: &[f32]) -> (Tensor<2>, Vec<f32>) {
        let normed = host::into_vec(self.output_norm.forward(core));
        let values = normed.iter().zip(gate).map(|(x, gate)| x * math::silu(*gate)).collect();
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
        let d_gate = d_gated.iter().zip(&normed).zip(&tape.gate).map(|((d, x), gate)| {
            let s = math::sigmoid(*gate);
            d * x * math::silu_derivative(*gate, s)
        });
        let d_gate: Vec<f32> = d_gate.collect();
        let d_normed = d_gated.iter().zip(&tape.gate).map(|(d, gate)| d * math::silu(*gate)).collect();
        let d_core = self.output_norm.backward(&core, &self.heads(d_normed, &device), wanted.parameters);
        let d_core = HostView::new(&d_core);
        let d = delta_rule_backward(&ready.input(), sequences, &self.shape, d_core.as_slice());
        let d_tape = DeltaTape {
            qkv: ready.heads.backward([&d.q, &d.k, &d.v], &self.taps, &self.columns(), sequences),
            gate: d_gate,
            beta: d.beta.iter().zip(&ready.beta).map(|(d, b)| d * b * (1.0 - b)).collect(),
            decay: {
                let per_head = self.rate.iter().zip(self.rate_bias.iter()).cycle();
                let all = d.g.iter().zip(&tape.decay).zip(per_head);
                all.map(|((d, a), (rate, bias))| -rate * d * math::sigmoid(a + bias)).collect()
            },
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
