//! A state space layer (Mamba2, arXiv 2405.21060) with its norm and residual.
//!
//! One projection of the normed input gives `[gate | x | b | c | steps]`. `x`, `b` and `c` go through a short causal
//! convolution and SiLU, steps through softplus. The recurrence itself is [`state_space`]; `skip` times `x` is added to
//! what it gives, and the sum times `silu(gate)` is normed, each group of channels by itself.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::{Linear, Norm, scaled, softplus};
use crate::{
    adapters::Wanted,
    host,
    kernels::{
        convolution::{advance_history, causal_convolution, causal_convolution_backward},
        math,
        rows::RowAccumulator,
        ssd::{SsdInput, SsdShape, state_space, state_space_backward},
    },
};

/// A state space layer with its norm.
#[derive(Clone, Debug)]
pub struct MambaLayer {
    /// Input norm.
    pub norm: Norm,
    /// `[2 heads * P + 2 groups * N + heads, H]`.
    pub input: Linear,
    /// Taps of the convolution of `x`, `b` and `c` `[K, C]`, `C = heads * P + 2 groups * N`.
    pub taps: Arc<[f32]>,
    /// Added to what the convolution gives `[C]`.
    pub convolution_bias: Option<Arc<[f32]>>,
    /// Rate of every head `[heads]`, `-e^{A_log}`.
    pub rates: Arc<[f32]>,
    /// Added to the steps before softplus `[heads]`.
    pub step_bias: Arc<[f32]>,
    /// Least step.
    pub least_step: f32,
    /// Factor of every head on `x`, added to the output `[heads]`.
    pub skip: Arc<[f32]>,
    /// Weight of the norm of the output `[heads * P]`.
    pub output_norm: Arc<[f32]>,
    /// Added to the mean square in that norm.
    pub eps: f32,
    /// Output projection `[H, heads * P]`.
    pub output: Linear,
    /// Numbers and widths of the heads.
    pub shape: SsdShape,
    /// Factor on the output before it is added to the input.
    pub residual: f32,
}

/// What the projection gives `[T, 2 heads * P + 2 groups * N + heads]`, row-major.
#[derive(Clone, Debug)]
pub struct MambaTape(Vec<f32>);

/// What generation keeps of a sequence, however long it is.
#[derive(Clone, Debug)]
pub struct MambaState {
    /// The last `K - 1` rows that went into the convolution.
    history: Vec<f32>,
    /// `[heads, P, N]`.
    state: Vec<f32>,
}

/// What the recurrence is given, and what that was made of.
struct Ready {
    /// What went into the convolution `[T, C]`.
    given: Vec<f32>,
    /// What came out of it, before SiLU `[T, C]`.
    convolved: Vec<f32>,
    x: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    /// Before softplus, the bias added `[T, heads]`.
    raw_steps: Vec<f32>,
    steps: Vec<f32>,
}

impl MambaLayer {
    /// Columns of the gate (and of `x`), of the convolution, and of the whole projection.
    fn widths(&self) -> [usize; 3] {
        let [x, b] = self.shape.widths();
        [x, x + 2 * b, 2 * x + 2 * b + self.shape.heads]
    }

    /// The projection of `x [T, H]`.
    pub fn project(&self, x: &Tensor<2>) -> MambaTape {
        MambaTape(host::into_vec(self.input.forward(&self.norm.forward(x))))
    }

    fn ready(&self, tape: &MambaTape, sequences: &[Range<usize>], history: Option<&[Vec<f32>]>) -> Ready {
        let ([wide, channels, all], [_, narrow]) = (self.widths(), self.shape.widths());
        let given = columns(&tape.0, all, wide..wide + channels);
        let mut convolved = causal_convolution(&given, &self.taps, channels, sequences, history);
        if let Some(bias) = &self.convolution_bias {
            convolved.chunks_exact_mut(channels).for_each(|row| row.iter_mut().zip(&**bias).for_each(|(x, b)| *x += b));
        }
        let part = |from: usize, width: usize| -> Vec<f32> {
            columns(&convolved, channels, from..from + width).into_iter().map(math::silu).collect()
        };
        let (x, b, c) = (part(0, wide), part(wide, narrow), part(wide + narrow, narrow));
        let mut raw_steps = columns(&tape.0, all, wide + channels..all);
        raw_steps.iter_mut().zip(self.step_bias.iter().cycle()).for_each(|(step, bias)| *step += bias);
        let steps = raw_steps.iter().map(|step| softplus(*step).max(self.least_step)).collect();
        Ready { given, convolved, x, b, c, raw_steps, steps }
    }

    fn input_of<'a>(&'a self, ready: &'a Ready) -> SsdInput<'a> {
        SsdInput { x: &ready.x, b: &ready.b, c: &ready.c, steps: &ready.steps, rates: &self.rates }
    }

    /// The output of the recurrence with `skip * x` `[T, heads * P]`.
    fn core(&self, ready: &Ready, sequences: &[Range<usize>], states: &mut [Vec<f32>]) -> Vec<f32> {
        let mut core = state_space(&self.input_of(ready), sequences, &self.shape, states);
        let (heads, width) = (self.shape.heads, self.shape.head_dim);
        for (i, (core, x)) in core.chunks_exact_mut(width).zip(ready.x.chunks_exact(width)).enumerate() {
            let skip = self.skip[i % heads];
            core.iter_mut().zip(x).for_each(|(core, x)| *core += skip * x);
        }
        core
    }

    /// `core * silu(gate)`, and its norm, `[T, heads * P]` each.
    fn gated(&self, core: &[f32], tape: &MambaTape) -> [Vec<f32>; 2] {
        let [wide, _, all] = self.widths();
        let gate = columns(&tape.0, all, 0..wide);
        let gated: Vec<f32> = core.iter().zip(&gate).map(|(core, gate)| core * math::silu(*gate)).collect();
        let group = wide / self.shape.groups;
        let mut normed = gated.clone();
        for (i, row) in normed.chunks_exact_mut(group).enumerate() {
            let weight = &self.output_norm[i % self.shape.groups * group..][..group];
            let factor = self.inverse_size(row);
            row.iter_mut().zip(weight).for_each(|(x, weight)| *x *= factor * weight);
        }
        [gated, normed]
    }

    /// `1 / sqrt(mean square + eps)`.
    fn inverse_size(&self, row: &[f32]) -> f32 {
        1.0 / (math::dot(row, row) / row.len() as f32 + self.eps).sqrt()
    }

    fn finish(&self, x: &Tensor<2>, normed: Vec<f32>) -> Tensor<2> {
        let normed = host::from_vec(normed, [x.dims()[0], self.widths()[0]], &x.device());
        let mut sum = RowAccumulator::from_tensor(scaled(self.output.forward(&normed), self.residual));
        sum.add(x);
        sum.into_tensor()
    }

    fn zero_states(&self, sequences: usize) -> Vec<Vec<f32>> {
        vec![vec![0.0; self.shape.state_len()]; sequences]
    }

    /// `x + output(...)`, given the projection of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &MambaTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let ready = self.ready(tape, sequences, None);
        let core = self.core(&ready, sequences, &mut self.zero_states(sequences.len()));
        let [_, normed] = self.gated(&core, tape);
        self.finish(x, normed)
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &MambaTape,
        sequences: &[Range<usize>],
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let (device, [wide, channels, all]) = (x.device(), self.widths());
        let tokens = x.dims()[0];
        let ready = self.ready(tape, sequences, None);
        let core = self.core(&ready, sequences, &mut self.zero_states(sequences.len()));
        let [gated, normed] = self.gated(&core, tape);
        let d_output = scaled(dy.clone(), self.residual);
        let normed = || host::from_vec(normed, [tokens, wide], &device);
        let d_normed = self.output.backward(normed, &d_output, Wanted { input: true, ..wanted })?;
        let mut d_gated = host::into_vec(d_normed);
        let group = wide / self.shape.groups;
        for (i, (d, v)) in d_gated.chunks_exact_mut(group).zip(gated.chunks_exact(group)).enumerate() {
            let weight = &self.output_norm[i % self.shape.groups * group..][..group];
            d.iter_mut().zip(weight).for_each(|(d, weight)| *d *= weight);
            let factor = self.inverse_size(v);
            let along = factor.powi(3) * math::dot(d, v) / group as f32;
            d.iter_mut().zip(v).for_each(|(d, v)| *d = *d * factor - v * along);
        }
        drop(gated);
        let gate = columns(&tape.0, all, 0..wide);
        let mut d_gate = vec![0.0; d_gated.len()];
        for ((d_gate, d), (gate, core)) in d_gate.iter_mut().zip(&mut d_gated).zip(gate.iter().zip(&core)) {
            let s = math::sigmoid(*gate);
            *d_gate = *d * core * math::silu_derivative(*gate, s);
            *d *= gate * s;
        }
        drop((core, gate));
        let d_core = d_gated;
        let mut d = state_space_backward(&self.input_of(&ready), sequences, &self.shape, &d_core);
        let (heads, width) = (self.shape.heads, self.shape.head_dim);
        for (i, (dx, d_core)) in d.x.chunks_exact_mut(width).zip(d_core.chunks_exact(width)).enumerate() {
            let skip = self.skip[i % heads];
            dx.iter_mut().zip(d_core).for_each(|(dx, d)| *dx += skip * d);
        }
        let narrow = self.shape.widths()[1];
        let mut d_convolved = Vec::with_capacity(tokens * channels);
        for t in 0..tokens {
            d_convolved.extend_from_slice(&d.x[t * wide..(t + 1) * wide]);
            d_convolved.extend_from_slice(&d.b[t * narrow..(t + 1) * narrow]);
            d_convolved.extend_from_slice(&d.c[t * narrow..(t + 1) * narrow]);
        }
        for (d, x) in d_convolved.iter_mut().zip(&ready.convolved) {
            *d *= math::silu_derivative(*x, math::sigmoid(*x));
        }
        let d_given = causal_convolution_backward(&d_convolved, &self.taps, channels, sequences);
        for ((d, raw), step) in d.steps.iter_mut().zip(&ready.raw_steps).zip(&ready.steps) {
            // a step below the least one is that, whatever it was
            *d *= if *step > self.least_step { math::sigmoid(*raw) } else { 0.0 };
        }
        let mut d_tape = Vec::with_capacity(tokens * all);
        for t in 0..tokens {
            d_tape.extend_from_slice(&d_gate[t * wide..(t + 1) * wide]);
            d_tape.extend_from_slice(&d_given[t * channels..(t + 1) * channels]);
            d_tape.extend_from_slice(&d.steps[t * heads..(t + 1) * heads]);
        }
        let d_tape = host::from_vec(d_tape, [tokens, all], &device);
        let wanted_z = Wanted { input: wanted.input || self.norm.is_trained(), ..wanted };
        let dz = self.input.backward(|| self.norm.forward(x), &d_tape, wanted_z)?;
        let dx = self.norm.backward(x, &dz, wanted.parameters);
        wanted.input.then(|| {
            let mut dx = RowAccumulator::from_tensor(dx);
            dx.add(&dy);
            dx.into_tensor()
        })
    }

    /// The state before the first token of a sequence.
    pub fn start(&self) -> MambaState {
        let channels = self.widths()[1];
        MambaState { history: vec![0.0; self.taps.len() - channels], state: vec![0.0; self.shape.state_len()] }
    }

    /// `x + output(...)` of further tokens `x [n, H]` of some sequences, whose states move on.
    pub fn step(&self, x: &Tensor<2>, sequences: &[Range<usize>], states: &mut [MambaState]) -> Tensor<2> {
        let tape = self.project(x);
        let mut history: Vec<Vec<f32>> = states.iter_mut().map(|state| std::mem::take(&mut state.history)).collect();
        let mut inner: Vec<Vec<f32>> = states.iter_mut().map(|state| std::mem::take(&mut state.state)).collect();
        let ready = self.ready(&tape, sequences, Some(&history));
        let core = self.core(&ready, sequences, &mut inner);
        let channels = self.widths()[1];
        for (history, rows) in history.iter_mut().zip(sequences) {
            advance_history(history, &ready.given[rows.start * channels..rows.end * channels]);
        }
        for ((state, history), inner) in states.iter_mut().zip(history).zip(inner) {
            *state = MambaState { history, state: inner };
        }
        let [_, normed] = self.gated(&core, &tape);
        self.finish(x, normed)
    }
}

/// Some columns of rows of a width.
fn columns(x: &[f32], width: usize, range: Range<usize>) -> Vec<f32> {
    x.chunks_exact(width).flat_map(|row| row[range.clone()].iter().copied()).collect()
}
