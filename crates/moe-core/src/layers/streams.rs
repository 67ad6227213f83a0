//! Several residual streams in place of one: manifold-constrained hyper-connections (arXiv 2512.24880).
//!
//! The streams of a token lie beside each other, `x [T, n H]`. A half of a layer reads their sum with the weights `a`;
//! then stream `k` becomes `b_k half + sum_j C_jk x_j`. `a = sigmoid(..) + eps`, `b = 2 sigmoid(..)`, and `C` is a
//! softmax by rows plus `eps` whose columns and rows are divided by their sums in turn. What is in the brackets are the
//! rows of one linear map of `x` divided by its root mean square, each times a scale plus a bias. The maps run on the
//! host, whatever the device: they are small.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::Norm;
use crate::{
    adapters::{Tokens, Wanted},
    host::{self, HostView},
    kernels::{math, new_rows, weight::Weight},
};

/// How a half of a layer reads and writes several streams. `n` streams of width `H`.
#[derive(Clone, Debug)]
pub struct HyperConnection {
    /// Division of all streams together by their root mean square `[n H]`.
    pub norm: Norm,
    /// Rows of the weights, of the multiples and of the mixture `[(2 + n) n, n H]`.
    pub map: Weight,
    /// Their bias `[(2 + n) n]`.
    pub base: Arc<[f32]>,
    /// Scales of weights, of multiples and of the mixture.
    pub scale: [f32; 3],
    /// Number of streams, n.
    pub count: usize,
    /// How often columns of the mixture are divided by their sums; rows are once less.
    pub iterations: usize,
    /// Added to weights, to the softmax and to every sum.
    pub eps: f32,
}

/// Weights, multiples and mixtures of some tokens.
#[derive(Clone, Debug)]
pub struct Mixing {
    /// Weights of the streams in what the half reads `[T, n]`.
    weights: Vec<f32>,
    /// Multiples of what the half gives `[T, n]`.
    multiples: Vec<f32>,
    /// Mixtures, from stream `j` to stream `k` `[T, n, n]`.
    mixtures: Vec<f32>,
}

/// The weighted sum of the streams that the norm before the head reads.
#[derive(Clone, Debug)]
pub struct StreamSum {
    /// Division of all streams together by their root mean square `[n H]`.
    pub norm: Norm,
    /// Rows of the weights `[n, n H]`.
    pub map: Weight,
    /// Their bias `[n]`.
    pub base: Arc<[f32]>,
    /// Their scale.
    pub scale: f32,
    /// Added to them.
    pub eps: f32,
}

/// The norm before the head, and what it reads of several streams.
#[derive(Clone, Debug)]
pub struct HeadInput {
    /// The norm `[H]`.
    pub norm: Norm,
    /// The sum of the streams, where there are several.
    pub streams: Option<Box<StreamSum>>,
}

impl HeadInput {
    /// What the head reads `[n, H]` of what the last layer gives.
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        match &self.streams {
            None => self.norm.forward(x),
            Some(streams) => self.norm.forward(&streams.forward(x)),
        }
    }

    /// Gradient with respect to what the last layer gives; with `parameters`, also that of a trained norm.
    pub fn backward(&self, x: &Tensor<2>, dh: &Tensor<2>, parameters: bool) -> Tensor<2> {
        match &self.streams {
            None => self.norm.backward(x, dh, parameters),
            Some(streams) => {
                let sum = streams.forward(x);
                streams.backward(x, &self.norm.backward(&sum, dh, parameters))
            }
        }
    }
}

/// The rows of the map of `x`.
fn mapped(norm: &Norm, map: &Weight, x: &Tensor<2>) -> Vec<f32> {
    host::into_vec(map.forward(&norm.forward(x), None))
}

/// Gradient with respect to `x` from that of the rows of the map `[T, rows]`.
fn map_gradient(norm: &Norm, map: &Weight, x: &Tensor<2>, d: Vec<f32>) -> Tensor<2> {
    let d = host::from_vec(d, [x.dims()[0], map.dims()[0]], &x.device());
    let wanted = Wanted { input: true, parameters: false };
    let d_normed = map.gradient(|| norm.forward(x), &d, Tokens::WAVE, wanted).expect("wanted");
    norm.backward(x, &d_normed, false)
}

/// `sum_i weights[t, i] x[t, i]` of streams `x [T, n H]`.
fn weighted_sum(weights: &[f32], x: &Tensor<2>, count: usize) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let hidden = width / count;
    let view = HostView::new(x);
    let x_rows = view.as_slice();
    let sums = new_rows(tokens, hidden, |t, sum| {
        for (stream, weight) in x_rows[t * width..(t + 1) * width].chunks_exact(hidden).zip(&weights[t * count..]) {
            sum.iter_mut().zip(stream).for_each(|(sum, x)| *sum += weight * x);
        }
    });
    host::from_vec(sums, [tokens, hidden], &x.device())
}

/// Inner product of stream `i` of every token with `d [T, H]`: `[T, n]`.
fn along_streams(x: &[f32], d: &[f32], count: usize, hidden: usize) -> Vec<f32> {
    let tokens = d.len() / hidden;
    new_rows(tokens, count, |t, out| {
        let d = &d[t * hidden..(t + 1) * hidden];
        let streams = x[t * count * hidden..(t + 1) * count * hidden].chunks_exact(hidden);
        out.iter_mut().zip(streams).for_each(|(out, stream)| *out = math::dot(stream, d));
    })
}

impl StreamSum {
    fn weights(&self, x: &Tensor<2>) -> Vec<f32> {
        let mut weights = mapped(&self.norm, &self.map, x);
        for row in weights.chunks_exact_mut(self.base.len()) {
            row.iter_mut().zip(&*self.base).for_each(|(z, b)| *z = math::sigmoid(*z * self.scale + b) + self.eps);
        }
        weights
    }

    fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        weighted_sum(&self.weights(x), x, self.base.len())
    }

    fn backward(&self, x: &Tensor<2>, d: &Tensor<2>) -> Tensor<2> {
        let (count, [tokens, hidden]) = (self.base.len(), d.dims());
        let weights = self.weights(x);
        let (xs, ds) = (HostView::new(x), HostView::new(d));
        let mut d_rows = along_streams(xs.as_slice(), ds.as_slice(), count, hidden);
        for (d, weight) in d_rows.iter_mut().zip(&weights) {
            let s = weight - self.eps;
            *d *= s * (1.0 - s) * self.scale;
        }
        let through = HostView::new(&map_gradient(&self.norm, &self.map, x, d_rows));
        let (through, ds) = (through.as_slice(), ds.as_slice());
        let width = count * hidden;
        let dx = new_rows(tokens, width, |t, dx| {
            dx.copy_from_slice(&through[t * width..(t + 1) * width]);
            for (dx, weight) in dx.chunks_exact_mut(hidden).zip(&weights[t * count..]) {
                dx.iter_mut().zip(&ds[t * hidden..(t + 1) * hidden]).for_each(|(dx, d)| *dx += weight * d);
            }
        });
        host::from_vec(dx, [tokens, width], &x.device())
    }
}

/// Divides rows or columns of an `n` by `n` matrix by their sums plus `eps`; gives the divisors.
fn divide(matrix: &mut [f32], n: usize, rows: bool, eps: f32) -> Vec<f32> {
    let at = |line: usize, i: usize| if rows { line * n + i } else { i * n + line };
    (0..n)
        .map(|line| {
            let divisor = (0..n).map(|i| matrix[at(line, i)]).sum::<f32>() + eps;
            (0..n).for_each(|i| matrix[at(line, i)] /= divisor);
            divisor
        })
        .collect()
}

impl HyperConnection {
    fn rows(&self) -> usize {
        (2 + self.count) * self.count
    }

    /// The softmax of the rows of the mixture plus `eps`, from the rows of the map of a token.
    fn softmax(&self, z: &[f32]) -> Vec<f32> {
        let n = self.count;
        let mut matrix: Vec<f32> =
            z[2 * n..].iter().zip(&self.base[2 * n..]).map(|(z, b)| z * self.scale[2] + b).collect();
        for row in matrix.chunks_exact_mut(n) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|z| *z = math::exp(*z - max));
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|p| *p = *p / sum + self.eps);
        }
        matrix
    }

    /// Whether the divisions go by rows, in order.
    fn divisions(&self) -> impl Iterator<Item = bool> {
        (0..2 * self.iterations - 1).map(|division| division % 2 == 1)
    }

    /// Gradient at the rows of the mixture in the map of a token, from that at the mixture.
    fn mixture_gradient(&self, z: &[f32], d_mixture: &mut [f32], out: &mut [f32]) {
        let n = self.count;
        let softmax = self.softmax(z);
        let mut matrix = softmax.clone();
        let mut steps = Vec::with_capacity(2 * self.iterations);
        for rows in self.divisions() {
            let divisors = divide(&mut matrix, n, rows, self.eps);
            steps.push((rows, divisors, matrix.clone()));
        }
        // with y = x / (sum of x + eps), dx = (dy - sum of dy y) / (sum of x + eps)
        for (rows, divisors, divided) in steps.iter().rev() {
            let at = |line: usize, i: usize| if *rows { line * n + i } else { i * n + line };
            for (line, divisor) in divisors.iter().enumerate() {
                let along: f32 = (0..n).map(|i| d_mixture[at(line, i)] * divided[at(line, i)]).sum();
                (0..n).for_each(|i| d_mixture[at(line, i)] = (d_mixture[at(line, i)] - along) / divisor);
            }
        }
        let rows = softmax.chunks_exact(n).zip(d_mixture.chunks_exact(n)).zip(out.chunks_exact_mut(n));
        for ((p, d), out) in rows {
            let along: f32 = p.iter().zip(d).map(|(p, d)| (p - self.eps) * d).sum();
            out.iter_mut().zip(p).zip(d).for_each(|((o, p), d)| *o = (p - self.eps) * (d - along) * self.scale[2]);
        }
    }

    /// What follows from streams `x [T, n H]`, and the weighted sum `[T, H]` that the half reads.
    pub fn open(&self, x: &Tensor<2>) -> (Mixing, Tensor<2>) {
        let (n, rows, tokens) = (self.count, self.rows(), x.dims()[0]);
        let z = mapped(&self.norm, &self.map, x);
        let sigmoid = |t: usize, i: usize, scale: f32| math::sigmoid(z[t * rows + i] * scale + self.base[i]);
        let weights = new_rows(tokens, n, |t, out| {
            out.iter_mut().enumerate().for_each(|(i, out)| *out = sigmoid(t, i, self.scale[0]) + self.eps);
        });
        let multiples = new_rows(tokens, n, |t, out| {
            out.iter_mut().enumerate().for_each(|(i, out)| *out = 2.0 * sigmoid(t, n + i, self.scale[1]));
        });
        let mixtures = new_rows(tokens, n * n, |t, out| {
            out.copy_from_slice(&self.softmax(&z[t * rows..(t + 1) * rows]));
            for by_rows in self.divisions() {
                divide(out, n, by_rows, self.eps);
            }
        });
        let sum = weighted_sum(&weights, x, n);
        (Mixing { weights, multiples, mixtures }, sum)
    }

    /// The streams after a half that gives `half [T, H]`.
    pub fn close(&self, x: &Tensor<2>, mixing: &Mixing, half: &Tensor<2>) -> Tensor<2> {
        let ([tokens, width], n, hidden) = (x.dims(), self.count, half.dims()[1]);
        let (xs, halves) = (HostView::new(x), HostView::new(half));
        let (xs, halves) = (xs.as_slice(), halves.as_slice());
        let out = new_rows(tokens, width, |t, out| {
            let (x, half) = (&xs[t * width..(t + 1) * width], &halves[t * hidden..(t + 1) * hidden]);
            for (k, out) in out.chunks_exact_mut(hidden).enumerate() {
                let multiple = mixing.multiples[t * n + k];
                out.iter_mut().zip(half).for_each(|(out, half)| *out = multiple * half);
                for (j, x) in x.chunks_exact(hidden).enumerate() {
                    let share = mixing.mixtures[(t * n + j) * n + k];
                    out.iter_mut().zip(x).for_each(|(out, x)| *out += share * x);
                }
            }
        });
        host::from_vec(out, [tokens, width], &x.device())
    }

    /// Gradient at what the half gives `[T, H]`, from that at the streams after it.
    pub fn half_gradient(&self, mixing: &Mixing, dy: &Tensor<2>) -> Tensor<2> {
        weighted_sum(&mixing.multiples, dy, self.count)
    }

    /// Gradients at the streams `x` before the half: through what it reads and through the weights, and around it. They
    /// follow from the gradient `dy` at the streams after it and from that at what it reads, `d_read [T, H]`; `half` is
    /// what it gave.
    pub fn input_gradients(
        &self,
        x: &Tensor<2>,
        mixing: &Mixing,
        half: &Tensor<2>,
        dy: &Tensor<2>,
        d_read: &Tensor<2>,
    ) -> [Tensor<2>; 2] {
        let ([tokens, width], n, rows, hidden) = (x.dims(), self.count, self.rows(), half.dims()[1]);
        let device = x.device();
        let z = mapped(&self.norm, &self.map, x);
        let [xs, halves, dys, d_reads] = [x, half, dy, d_read].map(HostView::new);
        let [xs, halves, dys, d_reads] = [&xs, &halves, &dys, &d_reads].map(HostView::as_slice);
        let d_weights = along_streams(xs, d_reads, n, hidden);
        let d_multiples = along_streams(dys, halves, n, hidden);
        let d_map = new_rows(tokens, rows, |t, out| {
            for i in 0..n {
                let s = mixing.weights[t * n + i] - self.eps;
                out[i] = d_weights[t * n + i] * s * (1.0 - s) * self.scale[0];
                let s = mixing.multiples[t * n + i] / 2.0;
                out[n + i] = d_multiples[t * n + i] * 2.0 * s * (1.0 - s) * self.scale[1];
            }
            let (x, dy) = (&xs[t * width..(t + 1) * width], &dys[t * width..(t + 1) * width]);
            let pairs = x.chunks_exact(hidden).flat_map(|x| dy.chunks_exact(hidden).map(|dy| math::dot(x, dy)));
            let mut d_mixture: Vec<f32> = pairs.collect();
            self.mixture_gradient(&z[t * rows..(t + 1) * rows], &mut d_mixture, &mut out[2 * n..]);
        });
        let through = HostView::new(&map_gradient(&self.norm, &self.map, x, d_map));
        let through = through.as_slice();
        let through = new_rows(tokens, width, |t, dx| {
            dx.copy_from_slice(&through[t * width..(t + 1) * width]);
            let d = &d_reads[t * hidden..(t + 1) * hidden];
            for (dx, weight) in dx.chunks_exact_mut(hidden).zip(&mixing.weights[t * n..]) {
                dx.iter_mut().zip(d).for_each(|(dx, d)| *dx += weight * d);
            }
        });
        let around = new_rows(tokens, width, |t, dx| {
            let dy = &dys[t * width..(t + 1) * width];
            for (j, dx) in dx.chunks_exact_mut(hidden).enumerate() {
                for (dy, share) in dy.chunks_exact(hidden).zip(&mixing.mixtures[(t * n + j) * n..]) {
                    dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += share * dy);
                }
            }
        });
        [through, around].map(|values| host::from_vec(values, [tokens, width], &device))
    }
}
