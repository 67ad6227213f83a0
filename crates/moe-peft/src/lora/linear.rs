//! The adapter of a linear map: low-rank additions that add up.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;
use moe_core::{
    adapters::{LinearAdapter, Tokens, Wanted},
    host::{self, HostView},
    kernels::{
        product::{Matrix, product},
        weight::Weight,
    },
};

use super::{dora::Magnitude, dropout::Dropout};
use crate::{Live, parameter_bank::add_values};

/// `s B A`, added to some rows of a map.
///
/// `y += s (d(x) A^T) B^T` for `x [n, in]`, `A [r, in]`, `B [out, r]` and dropout `d`; nothing of the size of the map
/// is made. Backward: `dA += s (dy B)^T d(x)`, `dB += s dy^T (d(x) A^T)`, `dx += d(s (dy B) A)`.
#[derive(Debug)]
pub(crate) struct Term {
    /// Rows of the map.
    pub rows: Range<usize>,
    pub a: Arc<Live>,
    pub b: Arc<Live>,
    pub scale: f32,
    /// What is taken away again, `s B_0 A_0`, where the adapter began as a part of the weight.
    pub start: Option<Start>,
    pub magnitude: Option<Magnitude>,
    /// `c [1, out]`, which `B` adds: `s c` is added to the output.
    pub bias: Option<Arc<Live>>,
    pub dropout: Option<Dropout>,
}

/// A frozen `A_0 [r, in]` and `B_0 [out, r]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Start {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub rank: usize,
}

impl Start {
    /// The same for some rows of the map.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        Self { b: self.b[rows.start * self.rank..rows.end * self.rank].to_vec(), ..self.clone() }
    }
}

/// Low-rank additions to a linear map `W [out, in]`, each to all of its rows or some: LoRA (arXiv 2106.09685), rsLoRA
/// (2312.03732) by its scale, DoRA (2402.09353).
#[derive(Debug)]
pub struct LoraLinear {
    dims: [usize; 2],
    terms: Vec<Term>,
}

impl LoraLinear {
    pub(crate) fn new(dims: [usize; 2], terms: Vec<Term>) -> Self {
        Self { dims, terms }
    }
}

impl Term {
    fn rank(&self) -> usize {
        self.a.shape()[0]
    }

    /// Adds `s (x A^T) B^T` to its rows of `y [n, width]`.
    fn add(&self, x: Matrix<'_>, n: usize, y: &mut [f32], (width, first): (usize, usize)) {
        let [rank, inputs] = self.a.shape();
        let (a, b) = (self.a.value(), self.b.value());
        let (a, b) = (HostView::new(&a), HostView::new(&b));
        let a = Matrix::new(a.as_slice(), rank, inputs).transposed();
        let b = Matrix::new(b.as_slice(), self.rows.len(), rank).transposed();
        let mut hidden = vec![0.0; n * rank];
        product(&mut hidden, rank, 0, false, 1.0, x, a);
        let Some(start) = &self.start else {
            product(y, width, first, true, self.scale, Matrix::new(&hidden, n, rank), b);
            return;
        };
        // the difference first, which is exactly 0 in the beginning
        let out = self.rows.len();
        let mut delta = vec![0.0; n * out];
        product(&mut delta, out, 0, false, 1.0, Matrix::new(&hidden, n, rank), b);
        hidden.resize(n * start.rank, 0.0);
        let (a, b) = (Matrix::new(&start.a, start.rank, inputs), Matrix::new(&start.b, out, start.rank));
        product(&mut hidden, start.rank, 0, false, 1.0, x, a.transposed());
        product(&mut delta, out, 0, true, -1.0, Matrix::new(&hidden, n, start.rank), b.transposed());
        for (y, delta) in y.chunks_exact_mut(width.max(1)).zip(delta.chunks_exact(out.max(1))) {
            y[first..first + out].iter_mut().zip(delta).for_each(|(y, d)| *y += self.scale * d);
        }
    }

    /// Adds `s c` to its rows of `y [n, width]`.
    fn add_bias(&self, y: &mut [f32], width: usize) {
        let Some(bias) = &self.bias else { return };
        let bias = HostView::new(&bias.value());
        for y in y.chunks_exact_mut(width.max(1)) {
            y[self.rows.clone()].iter_mut().zip(bias.as_slice()).for_each(|(y, c)| *y += self.scale * c);
        }
    }

    /// `dc += s sum_t dy_t` of its rows of `dy [n, width]`.
    fn bias_gradient(&self, dy: &[f32], width: usize) {
        let Some(bias) = self.bias.as_ref().filter(|bias| bias.is_trained()) else { return };
        bias.add_gradient(|sum| {
            for dy in dy.chunks_exact(width.max(1)) {
                sum.iter_mut().zip(&dy[self.rows.clone()]).for_each(|(sum, dy)| *sum += self.scale * dy);
            }
        });
    }

    /// Gradients from `dy [n, width]`, of which its rows begin at `first`; `x` is what it was given.
    fn gradients(
        &self,
        x: Matrix<'_>,
        n: usize,
        (dy, width, first): (&[f32], usize, usize),
        dx: Option<&mut [f32]>,
        parameters: bool,
    ) {
        let ([rank, inputs], out) = (self.a.shape(), self.rows.len());
        let (a, b) = (self.a.value(), self.b.value());
        let (a, b) = (HostView::new(&a), HostView::new(&b));
        let a = Matrix::new(a.as_slice(), rank, inputs);
        let b = Matrix::new(b.as_slice(), out, rank);
        let dy = Matrix::new(dy, n, width).columns(first..first + out);
        let mut d_hidden = vec![0.0; n * rank];
        product(&mut d_hidden, rank, 0, false, self.scale, dy, b);
        let d_hidden = Matrix::new(&d_hidden, n, rank);
        if let Some(dx) = dx {
            product(dx, inputs, 0, true, 1.0, d_hidden, a);
            if let Some(start) = &self.start {
                let mut d_hidden = vec![0.0; n * start.rank];
                let (a, b) = (Matrix::new(&start.a, start.rank, inputs), Matrix::new(&start.b, out, start.rank));
                product(&mut d_hidden, start.rank, 0, false, -self.scale, dy, b);
                product(dx, inputs, 0, true, 1.0, Matrix::new(&d_hidden, n, start.rank), a);
            }
        }
        if parameters && (self.a.is_trained() || self.b.is_trained()) {
            let mut hidden = vec![0.0; n * rank];
            product(&mut hidden, rank, 0, false, 1.0, x, a.transposed());
            let hidden = Matrix::new(&hidden, n, rank);
            if self.a.is_trained() {
                self.a.add_gradient(|sum| product(sum, inputs, 0, true, 1.0, d_hidden.transposed(), x));
            }
            if self.b.is_trained() {
                self.b.add_gradient(|sum| product(sum, rank, 0, true, self.scale, dy.transposed(), hidden));
            }
        }
    }

    /// Its matrix `[rows, in]`, added to those rows of `matrix`.
    fn add_matrix(&self, matrix: &mut [f32], inputs: usize) {
        let rank = self.rank();
        let (a, b) = (self.a.value(), self.b.value());
        let (a, b) = (HostView::new(&a), HostView::new(&b));
        let rows = &mut matrix[self.rows.start * inputs..self.rows.end * inputs];
        let (a, b) = (Matrix::new(a.as_slice(), rank, inputs), Matrix::new(b.as_slice(), self.rows.len(), rank));
        product(rows, inputs, 0, true, self.scale, b, a);
        if let Some(start) = &self.start {
            let a = Matrix::new(&start.a, start.rank, inputs);
            let b = Matrix::new(&start.b, self.rows.len(), start.rank);
            product(rows, inputs, 0, true, -self.scale, b, a);
        }
    }
}

impl LinearAdapter for LoraLinear {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn is_linear(&self) -> bool {
        self.terms.iter().all(|term| term.bias.is_none())
    }

    fn trained(&self) -> usize {
        let values = |live: &Arc<Live>| live.shape()[0] * live.shape()[1];
        let term = |term: &Term| {
            let magnitude = term.magnitude.as_ref().map_or(0, |magnitude| values(magnitude.live()));
            values(&term.a) + values(&term.b) + magnitude + term.bias.as_ref().map_or(0, values)
        };
        self.terms.iter().map(term).sum()
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        let y = base.forward_for(x, None, tokens);
        let ([out, inputs], n, device) = (self.dims, x.dims()[0], x.device());
        if n == 0 || out == 0 {
            return y;
        }
        let plain = |term: &Term| {
            term.magnitude.is_none() && term.dropout.is_none() && term.start.is_none() && term.bias.is_none()
        };
        if !host::is_host(&device) && self.terms.iter().all(plain) {
            return self.device_forward(y, x);
        }
        let view = HostView::new(x);
        let pristine = self.terms.iter().any(|term| term.magnitude.is_some()).then(|| y.clone());
        let mut values = host::into_vec(y);
        for term in &self.terms {
            let dropped = Dropout::apply(term.dropout.as_ref(), view.as_slice(), n, tokens);
            let input = dropped.as_ref().map_or(view.as_slice(), |(x, _)| x);
            let matrix = Matrix::new(input, n, inputs);
            match (&term.magnitude, &pristine) {
                (Some(magnitude), Some(pristine)) => {
                    let base_output = match &dropped {
                        Some((x, _)) => {
                            base.forward_for(&host::from_vec(x.clone(), [n, inputs], &device), None, tokens)
                        }
                        None => pristine.clone(),
                    };
                    let mut u = vec![0.0; n * term.rows.len()];
                    term.add(matrix, n, &mut u, (term.rows.len(), 0));
                    let base_output = HostView::new(&base_output);
                    magnitude.add(term, base, base_output.as_slice(), &u, &mut values, out);
                }
                _ => term.add(matrix, n, &mut values, (out, term.rows.start)),
            }
            term.add_bias(&mut values, out);
        }
        host::from_vec(values, [n, out], &device)
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let ([out, inputs], n, device) = (self.dims, x.dims()[0], x.device());
        if n == 0 || out == 0 {
            return wanted.input.then(|| base.backward(dy));
        }
        let (xs, dys) = (HostView::new(x), HostView::new(dy));
        let (xs, dys) = (xs.as_slice(), dys.as_slice());
        let mut dx = wanted.input.then(|| host::into_vec(base.backward(dy)));
        for term in &self.terms {
            if wanted.parameters {
                term.bias_gradient(dys, out);
            }
            let dropped = Dropout::apply(term.dropout.as_ref(), xs, n, tokens);
            let input = dropped.as_ref().map_or(xs, |(x, _)| x);
            let matrix = Matrix::new(input, n, inputs);
            // what flows through dropped inputs is gathered apart
            let mut apart = (dropped.is_some() && dx.is_some()).then(|| vec![0.0; n * inputs]);
            {
                let into = apart.as_mut().or(dx.as_mut());
                match &term.magnitude {
                    None => {
                        let into = into.map(Vec::as_mut_slice);
                        term.gradients(matrix, n, (dys, out, term.rows.start), into, wanted.parameters);
                    }
                    Some(magnitude) => {
                        let mut u = vec![0.0; n * term.rows.len()];
                        term.add(matrix, n, &mut u, (term.rows.len(), 0));
                        let input = host::from_vec(input.to_vec(), [n, inputs], &device);
                        let scaled = magnitude.backward(term, base, (&input, &u), dys, out, wanted.parameters);
                        let into = into.map(|into| {
                            // (g - 1) dy, through the weight itself
                            let through = host::from_vec(scaled.through_base, [n, out], &device);
                            let through = HostView::new(&base.backward(&through)).as_slice().to_vec();
                            into.iter_mut().zip(through).for_each(|(dx, d)| *dx += d);
                            into.as_mut_slice()
                        });
                        let rows = term.rows.len();
                        term.gradients(matrix, n, (&scaled.through_term, rows, 0), into, wanted.parameters);
                    }
                }
            }
            if let (Some(apart), Some((_, factors)), Some(dx)) = (apart, &dropped, dx.as_mut()) {
                dx.iter_mut().zip(apart).zip(factors).for_each(|((dx, d), f)| *dx += d * f);
            }
        }
        dx.map(|dx| host::from_vec(dx, [n, inputs], &device))
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        if !self.is_linear() {
            return None;
        }
        let tensor = base.to_tensor();
        let (device, [out, inputs]) = (tensor.device(), self.dims);
        let weight = HostView::new(&tensor).as_slice().to_vec();
        let mut matrix = weight.clone();
        for term in &self.terms {
            match &term.magnitude {
                None => term.add_matrix(&mut matrix, inputs),
                Some(magnitude) => {
                    let mut adapted = weight.clone();
                    term.add_matrix(&mut adapted, inputs);
                    let factors = magnitude.factors(term, base);
                    for (row, g) in term.rows.clone().zip(factors) {
                        let range = row * inputs..(row + 1) * inputs;
                        let rows = matrix[range.clone()].iter_mut().zip(&adapted[range.clone()]).zip(&weight[range]);
                        rows.for_each(|((m, adapted), w)| *m += g * adapted - w);
                    }
                }
            }
        }
        Some(host::from_vec(matrix, [out, inputs], &device))
    }

    fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        for Term { rows, a, b, scale, start, magnitude, bias, dropout: _ } in &self.terms {
            [rows.start, rows.end].iter().for_each(|end| add(&(*end as u64).to_le_bytes()));
            add(&scale.to_le_bytes());
            a.digest(add);
            b.digest(add);
            if let Some(Start { a, b, rank: _ }) = start {
                add_values(a, add);
                add_values(b, add);
            }
            if let Some(magnitude) = magnitude {
                magnitude.live().digest(add);
            }
            if let Some(bias) = bias {
                bias.digest(add);
            }
        }
    }
}

impl LoraLinear {
    /// The same with tensor operations, where matrices are not in host memory.
    fn device_forward(&self, y: Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
        let n = x.dims()[0];
        self.terms.iter().fold(y, |y, term| {
            let hidden = x.clone().matmul(term.a.value().transpose()); // [n, r]
            let delta = hidden.matmul(term.b.value().transpose()) * term.scale; // [n, rows]
            if term.rows == (0..self.dims[0]) {
                return y + delta;
            }
            let block = y.clone().narrow(1, term.rows.start, term.rows.len()) + delta;
            y.slice_assign([0..n, term.rows.clone()], block)
        })
    }
}
