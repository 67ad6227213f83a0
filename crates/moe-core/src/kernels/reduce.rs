//! Reductions over the rows of a matrix, the arithmetic of most importance statistics.
//!
//! Results come back in f64 on the host device, where rows are summed in a fixed order, and are sums over at most one
//! wave of tokens.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::{self, HostView};

/// Columns per parallel piece of a column reduction.
const COLUMN_BLOCK: usize = 64;

/// `out[j] += sum_t weights[t] * a[t,j]^2` for `a [n, m]`, `weights [n]`, `out [m]`.
pub fn add_weighted_column_squares(a: &Tensor<2>, weights: &[f32], out: &mut [f64]) {
    add_columns(a, weights, out, |x| x * x, |t| t.powi_scalar(2))
}

/// `out[j] += sum_t weights[t] * |a[t,j]|`.
pub fn add_weighted_column_magnitudes(a: &Tensor<2>, weights: &[f32], out: &mut [f64]) {
    add_columns(a, weights, out, f32::abs, |t| t.abs())
}

/// `sum_t a[t,j]` `[m]` of `a [n, m]`.
pub fn column_sums(a: &Tensor<2>) -> Vec<f32> {
    let [n, m] = a.dims();
    let mut sums = vec![0.0; m];
    add_columns(a, &vec![1.0; n], &mut sums, |x| x, |t| t);
    sums.into_iter().map(|sum| sum as f32).collect()
}

fn add_columns(
    a: &Tensor<2>,
    weights: &[f32],
    out: &mut [f64],
    f: impl Fn(f32) -> f32 + Sync + Copy,
    on_device: impl Fn(Tensor<2>) -> Tensor<2>,
) {
    let [n, m] = a.dims();
    assert_eq!((n, m), (weights.len(), out.len()), "matrix [n, m], weights [n] and out [m] must agree");
    if n == 0 || m == 0 {
        return;
    }
    if host::is_host(&a.device()) {
        let view = HostView::new(a);
        let a = view.as_slice();
        out.par_chunks_mut(COLUMN_BLOCK).enumerate().for_each(|(block, out)| {
            column_block(a, m, block * COLUMN_BLOCK, weights, out, f);
        });
    } else {
        let weights = host::from_vec(weights.to_vec(), [1, n], &a.device());
        let sums = host::into_vec(weights.matmul(on_device(a.clone())));
        for (out, sum) in out.iter_mut().zip(sums) {
            *out += f64::from(sum);
        }
    }
}

/// Adds one block of columns: f32 partial sums over 32 rows, carried in f64.
#[inline(always)]
fn column_block(a: &[f32], m: usize, first: usize, weights: &[f32], out: &mut [f64], f: impl Fn(f32) -> f32 + Copy) {
    let width = out.len();
    for (block, weights) in weights.chunks(32).enumerate() {
        let mut partial = [0.0f32; COLUMN_BLOCK];
        for (t, &w) in weights.iter().enumerate() {
            let start = (block * 32 + t) * m + first;
            let row = &a[start..start + width];
            if width == COLUMN_BLOCK {
                for j in 0..COLUMN_BLOCK {
                    partial[j] += w * f(row[j]);
                }
            } else {
                for (p, &x) in partial.iter_mut().zip(row) {
                    *p += w * f(x);
                }
            }
        }
        for (o, p) in out.iter_mut().zip(partial) {
            *o += f64::from(p);
        }
    }
}

/// `|a[t,:]|^2` of each row `[n]`.
pub fn row_square_norms(a: &Tensor<2>) -> Vec<f32> {
    let [n, m] = a.dims();
    if n == 0 || m == 0 {
        return vec![0.0; n];
    }
    if host::is_host(&a.device()) {
        let view = HostView::new(a);
        view.as_slice()
            .par_chunks(m)
            .with_min_len(super::rows_per_piece(m))
            .map(|row| super::math::dot(row, row))
            .collect()
    } else {
        host::into_vec(a.clone().powi_scalar(2).sum_dim(1).reshape([n]))
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn column_and_row_reductions_match_plain_sums() {
        let device = burn::tensor::Device::flex();
        for (n, m) in [(1, 1), (3, 5), (70, 130), (33, 64)] {
            let values: Vec<f32> = (0..n * m).map(|i| ((i * 37 % 23) as f32 - 11.0) * 0.1).collect();
            let weights: Vec<f32> = (0..n).map(|i| 0.5 + i as f32 * 0.01).collect();
            let a = host::from_vec(values.clone(), [n, m], &device);
            let (mut squares, mut magnitudes) = (vec![1.0; m], vec![0.0; m]);
            add_weighted_column_squares(&a, &weights, &mut squares);
            add_weighted_column_magnitudes(&a, &weights, &mut magnitudes);
            for j in 0..m {
                let column = |f: fn(f64) -> f64| -> f64 {
                    (0..n).map(|t| weights[t] as f64 * f(values[t * m + j] as f64)).sum()
                };
                assert!((squares[j] - 1.0 - column(|x| x * x)).abs() < 1e-4);
                assert!((magnitudes[j] - column(f64::abs)).abs() < 1e-4);
            }
            let sums = column_sums(&a);
            for j in 0..m {
                let expected: f64 = (0..n).map(|t| f64::from(values[t * m + j])).sum();
                assert!((f64::from(sums[j]) - expected).abs() < 1e-4);
            }
            for (t, norm) in row_square_norms(&a).into_iter().enumerate() {
                let expected: f32 = values[t * m..(t + 1) * m].iter().map(|x| x * x).sum();
                assert!((norm - expected).abs() < 1e-4);
            }
        }
    }
}
