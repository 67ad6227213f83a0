//! The gated short convolution of LFM2, with its norm and residual: `x + output(c * convolution(b * u))`, where one
//! projection of the normed input gives `[b | c | u]`.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::{Linear, Norm};
use crate::{
    adapters::Wanted,
    host::{self, HostView},
    kernels::{
        convolution::{advance_history, causal_convolution, causal_convolution_backward},
        rows::RowAccumulator,
    },
};

/// A gated short convolution with its norm.
#[derive(Clone, Debug)]
pub struct ConvolutionLayer {
    /// Input norm.
    pub norm: Norm,
    /// `[3 H, H]`.
    pub input: Linear,
    /// Taps of the convolution `[K, H]`.
    pub taps: Arc<[f32]>,
    /// Output projection `[H, H]`.
    pub output: Linear,
}

/// What the projection gives `[T, 3 H]`, row-major.
#[derive(Clone, Debug)]
pub struct ConvolutionTape(Vec<f32>);

/// What generation keeps of a sequence: the last `K - 1` rows that went into the convolution.
pub type ConvolutionState = Vec<f32>;

impl ConvolutionLayer {
    fn width(&self) -> usize {
        self.input.weight.dims()[0] / 3
    }

    /// The projection of `x [T, H]`.
    pub fn project(&self, x: &Tensor<2>) -> ConvolutionTape {
        ConvolutionTape(host::into_vec(self.input.forward(&self.norm.forward(x))))
    }

    /// One of the three parts of the projection, `[T, H]`.
    fn part(&self, tape: &ConvolutionTape, which: usize) -> Vec<f32> {
        let width = self.width();
        tape.0.chunks_exact(3 * width).flat_map(|row| row[which * width..(which + 1) * width].iter().copied()).collect()
    }

    /// `b * u`, which goes into the convolution, and what comes out of it.
    fn convolved(
        &self,
        tape: &ConvolutionTape,
        sequences: &[Range<usize>],
        history: Option<&[Vec<f32>]>,
    ) -> [Vec<f32>; 2] {
        let u = product(&self.part(tape, 0), &self.part(tape, 2));
        let y = causal_convolution(&u, &self.taps, self.width(), sequences, history);
        [u, y]
    }

    fn finish(&self, x: &Tensor<2>, tape: &ConvolutionTape, convolved: &[f32]) -> Tensor<2> {
        let gated = host::from_vec(product(&self.part(tape, 1), convolved), x.dims(), &x.device());
        let mut sum = RowAccumulator::from_tensor(self.output.forward(&gated));
        sum.add(x);
        sum.into_tensor()
    }

    /// `x + output(...)`, given the projection of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &ConvolutionTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let [_, y] = self.convolved(tape, sequences, None);
        self.finish(x, tape, &y)
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &ConvolutionTape,
        sequences: &[Range<usize>],
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let (device, dims) = (x.device(), x.dims());
        let [_, y] = self.convolved(tape, sequences, None);
        let [b, c, u] = [0, 1, 2].map(|which| self.part(tape, which));
        let gated = || host::from_vec(product(&c, &y), dims, &device);
        let d = self.output.backward(gated, &dy, Wanted { input: true, ..wanted })?;
        let d = HostView::new(&d);
        let through = causal_convolution_backward(&product(d.as_slice(), &c), &self.taps, self.width(), sequences);
        let parts = [product(&through, &u), product(d.as_slice(), &y), product(&through, &b)];
        let width = self.width();
        let mut d_tape = Vec::with_capacity(3 * through.len());
        for t in 0..dims[0] {
            parts.iter().for_each(|part| d_tape.extend_from_slice(&part[t * width..(t + 1) * width]));
        }
        let d_tape = host::from_vec(d_tape, [dims[0], 3 * width], &device);
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
    pub fn start(&self) -> ConvolutionState {
        vec![0.0; self.taps.len() - self.width()]
    }

    /// `x + output(...)` of further tokens `x [n, H]` of some sequences, whose states move on.
    pub fn step(&self, x: &Tensor<2>, sequences: &[Range<usize>], states: &mut [ConvolutionState]) -> Tensor<2> {
        let tape = self.project(x);
        let [u, y] = self.convolved(&tape, sequences, Some(&*states));
        let width = self.width();
        for (state, rows) in states.iter_mut().zip(sequences) {
            advance_history(state, &u[rows.start * width..rows.end * width]);
        }
        self.finish(x, &tape, &y)
    }
}

/// Element by element.
fn product(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}
