//! DoRA: a trained magnitude for every output row (arXiv 2402.09353).

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;
use moe_core::{host::HostView, kernels::weight::Weight};

use super::linear::Term;
use crate::Live;

/// `y = g (W x + s B A x)` with `g = m / n`, `n = ||W + s B A||` per output row: the direction is learned by `A` and
/// `B`, the length `m [out]` by itself. `n` is a constant for the gradients, as in section 4.3 of the paper and in
/// every implementation.
///
/// `W + s B A` is never made: with `P = W A^T` and `G = A A^T`,
/// `n^2 = ||W||^2 + 2 s sum_r B_r P_r + s^2 B G B^T` per row, `r` products with `W` instead of a matrix of its size.
#[derive(Debug)]
pub(crate) struct Magnitude {
    /// `[1, out]`.
    m: Arc<Live>,
    norms: Mutex<Norms>,
}

#[derive(Debug, Default)]
struct Norms {
    /// `||W||^2` per row, which never changes.
    weight: Option<Arc<Vec<f64>>>,
    /// The values of `A` and `B` that `n` was computed for, and `n`.
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    a: Vec<f32>,
    b: Vec<f32>,
    n: Arc<Vec<f32>>,
}

/// Gradients on the two ways through an adapted map.
pub(crate) struct Scaled {
    /// `(g - 1) dy [n, width]`, zero outside the rows of the term.
    pub through_base: Vec<f32>,
    /// `g dy [n, rows]`.
    pub through_term: Vec<f32>,
}

impl Magnitude {
    pub fn new(m: Arc<Live>) -> Self {
        Self { m, norms: Mutex::default() }
    }

    pub fn live(&self) -> &Arc<Live> {
        &self.m
    }

    /// `n [rows]`.
    fn norms(&self, term: &Term, base: &Weight) -> Arc<Vec<f32>> {
        let (a, b) = (term.a.value(), term.b.value());
        let (av, bv) = (HostView::new(&a), HostView::new(&b));
        let mut norms = self.norms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = norms.last.as_ref().filter(|last| last.a == av.as_slice() && last.b == bv.as_slice()) {
            return last.n.clone();
        }
        let weight = norms.weight.get_or_insert_with(|| Arc::new(squared_norms(base, term))).clone();
        let projected = base.forward(&a, None); // [r, out of the whole map]
        let projected = HostView::new(&projected);
        let n = row_norms(
            &weight,
            (av.as_slice(), bv.as_slice(), term.a.shape()[0]),
            (projected.as_slice(), base.dims()[0], term.rows.start),
            term.scale,
        );
        let n = Arc::new(n);
        norms.last = Some(Last { a: av.as_slice().to_vec(), b: bv.as_slice().to_vec(), n: n.clone() });
        n
    }

    /// `g [rows]`.
    pub fn factors(&self, term: &Term, base: &Weight) -> Vec<f32> {
        let m = self.m.value();
        let m = HostView::new(&m);
        // a row that is zero has no direction, whatever its magnitude
        let factor = |(m, n): (&f32, &f32)| if *n == 0.0 { 1.0 } else { m / n };
        m.as_slice().iter().zip(self.norms(term, base).iter()).map(factor).collect()
    }

    /// Adds `(g - 1) W x + g u` to the rows of the term of `y [n, width]`, where `base_output [n, width]` is `W x` and
    /// `u [n, rows]` is `s B A x`.
    pub fn add(&self, term: &Term, base: &Weight, base_output: &[f32], u: &[f32], y: &mut [f32], width: usize) {
        let factors = self.factors(term, base);
        let rows = y.chunks_exact_mut(width).zip(base_output.chunks_exact(width)).zip(u.chunks_exact(factors.len()));
        for ((y, w), u) in rows {
            let (y, w) = (&mut y[term.rows.clone()], &w[term.rows.clone()]);
            for (((y, w), u), g) in y.iter_mut().zip(w).zip(u).zip(&factors) {
                *y += (g - 1.0) * w + g * u;
            }
        }
    }

    /// Splits `dy [n, width]`; adds `dm = sum_t dy (W x + u) / n` if `parameters`.
    pub fn backward(
        &self,
        term: &Term,
        base: &Weight,
        (input, u): (&Tensor<2>, &[f32]),
        dy: &[f32],
        width: usize,
        parameters: bool,
    ) -> Scaled {
        let factors = self.factors(term, base);
        let (n, out) = (dy.len() / width, factors.len());
        let mut scaled = Scaled { through_base: vec![0.0; n * width], through_term: Vec::with_capacity(n * out) };
        for (dy, through) in dy.chunks_exact(width).zip(scaled.through_base.chunks_exact_mut(width)) {
            let dy = &dy[term.rows.clone()];
            for ((through, dy), g) in through[term.rows.clone()].iter_mut().zip(dy).zip(&factors) {
                *through = (g - 1.0) * dy;
            }
            scaled.through_term.extend(dy.iter().zip(&factors).map(|(dy, g)| g * dy));
        }
        if parameters {
            let norms = self.norms(term, base);
            let output = base.forward(input, None);
            let output = HostView::new(&output);
            let mut sums = vec![0.0f64; out];
            let rows = dy.chunks_exact(width).zip(output.as_slice().chunks_exact(width)).zip(u.chunks_exact(out));
            for ((dy, w), u) in rows {
                let values = dy[term.rows.clone()].iter().zip(&w[term.rows.clone()]).zip(u);
                for (sum, ((dy, w), u)) in sums.iter_mut().zip(values) {
                    *sum += f64::from(*dy) * f64::from(w + u);
                }
            }
            self.m.add_gradient(|gradient| {
                for ((gradient, sum), n) in gradient.iter_mut().zip(&sums).zip(norms.iter()).filter(|(_, n)| **n > 0.0)
                {
                    *gradient += (sum / f64::from(*n)) as f32;
                }
            });
        }
        scaled
    }
}

/// `||W||^2` of the rows of a term.
fn squared_norms(base: &Weight, term: &Term) -> Vec<f64> {
    let inputs = base.dims()[1];
    let matrix = base.to_tensor();
    let matrix = HostView::new(&matrix);
    let rows = &matrix.as_slice()[term.rows.start * inputs..term.rows.end * inputs];
    rows.chunks_exact(inputs.max(1)).map(squared_norm).collect()
}

/// Sum of squares, in f64.
pub(crate) fn squared_norm(row: &[f32]) -> f64 {
    row.iter().map(|w| f64::from(*w).powi(2)).sum()
}

/// `||W + s B A||` per row from `||W||^2 [rows]`, `A [r, in]`, `B [rows, r]` and `P = A W^T [r, width]`, whose rows
/// begin at `first`.
pub(crate) fn row_norms(
    weight: &[f64],
    (a, b, rank): (&[f32], &[f32], usize),
    (projected, width, first): (&[f32], usize, usize),
    scale: f32,
) -> Vec<f32> {
    let inputs = a.len() / rank.max(1);
    let row = |r: usize| &a[r * inputs..(r + 1) * inputs];
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let gram: Vec<f64> = (0..rank * rank).map(|i| dot(row(i / rank), row(i % rank))).collect();
    let scale = f64::from(scale);
    let norm = |o: usize| {
        let b = &b[o * rank..(o + 1) * rank];
        let mut square = weight[o];
        for (r, b_r) in b.iter().enumerate() {
            let quadratic: f64 = b.iter().enumerate().map(|(q, b_q)| f64::from(*b_q) * gram[r * rank + q]).sum();
            let linear = f64::from(projected[r * width + first + o]);
            square += f64::from(*b_r) * (2.0 * scale * linear + scale * scale * quadratic);
        }
        square.max(0.0).sqrt() as f32
    };
    (0..weight.len()).map(norm).collect()
}
