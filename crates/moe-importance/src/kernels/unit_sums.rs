//! Sums over the rows of an expert's unit matrices, any number of them in one walk.
//!
//! Units, their gradients and whatever else has a column per unit are read block by block: 64 columns of 32 rows stay
//! in the first-level cache while every sum that is asked for is formed from them. A second sum costs arithmetic, not
//! memory traffic.

use std::ops::Range;

use burn::tensor::Tensor;
use moe_core::host::{self, HostView};
use multiversion::multiversion;
use rayon::prelude::*;

/// Columns per parallel piece.
const BLOCK: usize = 64;
/// Rows whose sums are f32, before they are carried in f64.
const ROWS: usize = 32;

/// What is summed over the rows t of an expert for each unit j.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Term<'a> {
    /// `w_t |u_t[j]|`, weights `[n]`.
    Magnitude(&'a [f32]),
    /// `u_t[j]^2`.
    Square,
    /// `o_t[j]^2` of the other matrix.
    OtherSquare,
    /// `w_t u_t[j] o_t[j]`, weights `[n]`.
    Product(&'a [f32]),
    /// `|u_t[j] o_t[j]|`.
    ProductMagnitude,
    /// `(u_t[j] o_t[j])^2`.
    ProductSquare,
    /// `(dg_t[j]^2 + dv_t[j]^2) a_t + u_t[j]^2 b_t`, weights a and b `[n]`.
    Fisher(&'a [f32], &'a [f32]),
}

/// Matrices with a column per unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnitMatrices<'a> {
    /// u `[n, I]`.
    pub units: &'a Tensor<2>,
    /// o `[n, I]`: the gradients at the units, say. Needed by the terms that name it.
    pub other: Option<&'a Tensor<2>>,
    /// `[dg | dv]` `[n, 2I]`. Needed by [`Term::Fisher`].
    pub gate_up: Option<&'a Tensor<2>>,
}

/// The sums of `terms`, `[terms][I]`. On the host rows are added in a fixed order, whatever the number of threads.
pub(crate) fn unit_sums(matrices: UnitMatrices<'_>, terms: &[Term<'_>]) -> Vec<Vec<f64>> {
    let [n, width] = matrices.units.dims();
    if n == 0 || width == 0 || terms.is_empty() {
        return vec![vec![0.0; width]; terms.len()];
    }
    if host::is_host(&matrices.units.device()) { on_host(matrices, terms) } else { on_device(matrices, terms) }
}

fn on_host(matrices: UnitMatrices<'_>, terms: &[Term<'_>]) -> Vec<Vec<f64>> {
    let [n, width] = matrices.units.dims();
    let views = [Some(matrices.units), matrices.other, matrices.gate_up].map(|tensor| tensor.map(HostView::new));
    let [units, other, gate_up] = views.each_ref().map(|view| view.as_ref().map_or(&[][..], HostView::as_slice));
    let rows = Rows { units, other, gate_up, n, width };
    let mut blocks = vec![0.0; width.div_ceil(BLOCK) * terms.len() * BLOCK]; // [blocks][terms][BLOCK]
    blocks.par_chunks_mut(terms.len() * BLOCK).enumerate().for_each(|(block, sums)| {
        let first = block * BLOCK;
        column_block(&rows, terms, first..width.min(first + BLOCK), sums);
    });
    let mut out = vec![Vec::with_capacity(width.next_multiple_of(BLOCK)); terms.len()];
    for block in blocks.chunks_exact(terms.len() * BLOCK) {
        out.iter_mut().zip(block.chunks_exact(BLOCK)).for_each(|(out, block)| out.extend_from_slice(block));
    }
    out.iter_mut().for_each(|out| out.truncate(width));
    out
}

/// Row-major host memory of [`UnitMatrices`]; absent ones are empty.
struct Rows<'a> {
    units: &'a [f32],
    other: &'a [f32],
    gate_up: &'a [f32],
    n: usize,
    width: usize,
}

/// `sums [terms][BLOCK]` of some columns.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn column_block(rows: &Rows<'_>, terms: &[Term<'_>], columns: Range<usize>, sums: &mut [f64]) {
    let (width, len) = (rows.width, columns.len());
    let unit = |t: usize| &rows.units[t * width + columns.start..][..len];
    let other = |t: usize| &rows.other[t * width + columns.start..][..len];
    let gate = |t: usize| &rows.gate_up[2 * t * width + columns.start..][..len];
    let up = |t: usize| &rows.gate_up[(2 * t + 1) * width + columns.start..][..len];
    for first in (0..rows.n).step_by(ROWS) {
        for (term, sums) in terms.iter().zip(sums.chunks_exact_mut(BLOCK)) {
            let mut partial = [0.0f32; BLOCK];
            for t in first..rows.n.min(first + ROWS) {
                match *term {
                    Term::Magnitude(w) => add(&mut partial, [unit(t)], |[u]| w[t] * u.abs()),
                    Term::Square => add(&mut partial, [unit(t)], |[u]| u * u),
                    Term::OtherSquare => add(&mut partial, [other(t)], |[o]| o * o),
                    Term::Product(w) => add(&mut partial, [unit(t), other(t)], |[u, o]| w[t] * (u * o)),
                    Term::ProductMagnitude => add(&mut partial, [unit(t), other(t)], |[u, o]| (u * o).abs()),
                    Term::ProductSquare => add(&mut partial, [unit(t), other(t)], |[u, o]| (u * o) * (u * o)),
                    Term::Fisher(a, b) => {
                        let (a, b) = (a[t], b[t]);
                        add(&mut partial, [unit(t), gate(t), up(t)], |[u, g, v]| a * (g * g + v * v) + b * (u * u))
                    }
                }
            }
            sums.iter_mut().zip(partial).for_each(|(sum, p)| *sum += f64::from(p));
        }
    }
}

/// `partial[j] += f(columns j)`, with a loop of constant length where all columns are there.
#[inline(always)]
fn add<const N: usize>(partial: &mut [f32; BLOCK], rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) {
    let full: [Option<&[f32; BLOCK]>; N] = rows.map(|row| row.try_into().ok());
    if full.iter().all(Option::is_some) {
        let rows = full.map(|row| row.unwrap_or(&[0.0; BLOCK]));
        for j in 0..BLOCK {
            partial[j] += f(rows.map(|row| row[j]));
        }
    } else {
        for j in 0..rows.iter().map(|row| row.len()).min().unwrap_or(0) {
            partial[j] += f(rows.map(|row| row[j]));
        }
    }
}

/// The body for any device.
fn on_device(matrices: UnitMatrices<'_>, terms: &[Term<'_>]) -> Vec<Vec<f64>> {
    let [n, width] = matrices.units.dims();
    let device = matrices.units.device();
    let units = || matrices.units.clone();
    let other = || matrices.other.cloned().unwrap_or_else(|| Tensor::zeros([n, width], &device));
    let product = || units() * other();
    let weighted = |weights: &[f32], values: Tensor<2>| {
        host::from_vec(weights.to_vec(), [1, n], &device).matmul(values) // [1, columns]
    };
    let sums = terms.iter().map(|term| match term {
        Term::Magnitude(w) => weighted(w, units().abs()),
        Term::Square => units().powi_scalar(2).sum_dim(0),
        Term::OtherSquare => other().powi_scalar(2).sum_dim(0),
        Term::Product(w) => weighted(w, product()),
        Term::ProductMagnitude => product().abs().sum_dim(0),
        Term::ProductSquare => product().powi_scalar(2).sum_dim(0),
        Term::Fisher(a, b) => {
            let gate_up = matrices.gate_up.cloned().unwrap_or_else(|| Tensor::zeros([n, 2 * width], &device));
            let gate_up = weighted(a, gate_up.powi_scalar(2)).reshape([2, width]).sum_dim(0);
            gate_up + weighted(b, units().powi_scalar(2))
        }
    });
    // One transfer for all of them.
    let sums = host::into_vec(Tensor::cat(sums.collect(), 0)); // [terms, I]
    sums.chunks_exact(width).map(|sums| sums.iter().copied().map(f64::from).collect()).collect()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn both_bodies_are_plain_sums() {
        for (n, width) in [(1, 1), (3, 5), (70, 130), (33, 64), (32, 192)] {
            let value = |i: usize, salt: usize| (((i + salt) * 7919 % 2003) as f32 - 1001.0) * 1e-3;
            let values = |columns: usize, salt: usize| (0..n * columns).map(|i| value(i, salt)).collect::<Vec<f32>>();
            let (u, o, g) = (values(width, 1), values(width, 77), values(2 * width, 500));
            let (a, b) = (values(1, 11), values(1, 900));
            let tensor = |v: &Vec<f32>, columns| host::from_vec(v.clone(), [n, columns], &Device::flex());
            let (units, other, gate_up) = (tensor(&u, width), tensor(&o, width), tensor(&g, 2 * width));
            let matrices = UnitMatrices { units: &units, other: Some(&other), gate_up: Some(&gate_up) };
            let terms = [
                Term::Magnitude(&a),
                Term::Square,
                Term::OtherSquare,
                Term::Product(&b),
                Term::ProductMagnitude,
                Term::ProductSquare,
                Term::Fisher(&a, &b),
            ];
            let (host, device) = (on_host(matrices, &terms), on_device(matrices, &terms));
            let at = |m: &[f32], t: usize, j: usize, columns: usize| f64::from(m[t * columns + j]);
            for j in 0..width {
                let mut expected = [0.0; 7];
                for t in 0..n {
                    let (u, o) = (at(&u, t, j, width), at(&o, t, j, width));
                    let (dg, dv) = (at(&g, t, j, 2 * width), at(&g, t, j + width, 2 * width));
                    let (a, b) = (f64::from(a[t]), f64::from(b[t]));
                    let values = [
                        a * u.abs(),
                        u * u,
                        o * o,
                        b * u * o,
                        (u * o).abs(),
                        (u * o).powi(2),
                        a * (dg * dg + dv * dv) + b * u * u,
                    ];
                    expected.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                }
                for (term, expected) in expected.into_iter().enumerate() {
                    for found in [host[term][j], device[term][j]] {
                        assert!((found - expected).abs() < 2e-5, "{:?}, {n} rows, unit {j}: {found}", terms[term]);
                    }
                }
            }
        }
    }
}
