//! Products of blocks of matrices, added in place: gradients of weights, and maps with a few blocks of their own.

use std::ops::Range;

use burn::tensor::Tensor;

use super::rows::RowAccumulator;
use crate::host::{self, HostView};

/// Multiply-adds from which on a product is shared between threads.
const SHARED: usize = 1 << 21;

/// `out[i, j] += factor * sum_t a[t, rows.start + i] * b[t, columns.start + j]` for `a [n, m]`, `b [n, k]` and `out
/// [rows.len(), columns.len()]`: a block of the gradient `dy^T x` of a weight.
///
/// # Panics
/// If the ranges are out of bounds or `out` has another size.
pub fn add_transposed_product(
    a: &Tensor<2>,
    rows: Range<usize>,
    b: &Tensor<2>,
    columns: Range<usize>,
    factor: f32,
    out: &mut [f32],
) {
    let ([n, m], [other, k]) = (a.dims(), b.dims());
    assert_eq!((n, rows.len() * columns.len()), (other, out.len()), "rows of both matrices, and size of the sum");
    assert!(rows.end <= m && columns.end <= k, "block {rows:?} x {columns:?} of {m} x {k}");
    if out.is_empty() || n == 0 {
        return;
    }
    if !host::is_host(&a.device()) {
        let part = |x: &Tensor<2>, range: &Range<usize>| x.clone().narrow(1, range.start, range.len());
        let product = host::into_vec(part(a, &rows).transpose().matmul(part(b, &columns)));
        out.iter_mut().zip(product).for_each(|(out, product)| *out += factor * product);
        return;
    }
    let (a, b) = (HostView::new(a), HostView::new(b));
    let work = n * rows.len() * columns.len();
    let parallelism = if work < SHARED { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    // SAFETY: the ranges are in bounds of both matrices, and `out` is a matrix of its own, all checked above.
    unsafe {
        gemm::gemm(
            rows.len(),
            columns.len(),
            n,
            out.as_mut_ptr(),
            1,
            columns.len() as isize,
            true,
            a.as_slice().as_ptr().add(rows.start),
            m as isize,
            1,
            b.as_slice().as_ptr().add(columns.start),
            1,
            k as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `out[t, rows.start + i] += sum_j x[t, columns.start + j] * w[i, j]` for `x [n, k]`, `w [rows.len(), columns.len()]`
/// and `out [n, m]`: a block of the product `x w^T`. With `transposed`, `out[t, columns.start + j] += sum_i x[t,
/// rows.start + i] * w[i, j]`: a block of `x w`.
///
/// # Panics
/// If the ranges are out of bounds or `w` has another size.
pub fn add_block_product(
    out: &mut RowAccumulator,
    x: &Tensor<2>,
    w: &[f32],
    rows: Range<usize>,
    columns: Range<usize>,
    transposed: bool,
) {
    let (from, to) = if transposed { (rows.clone(), columns.clone()) } else { (columns.clone(), rows.clone()) };
    let [n, k] = x.dims();
    assert_eq!(w.len(), rows.len() * columns.len(), "values of the block {rows:?} x {columns:?}");
    assert!(from.end <= k, "columns {from:?} of {k}");
    if n == 0 || w.is_empty() {
        return;
    }
    let (row, column) = if transposed { (1, columns.len() as isize) } else { (columns.len() as isize, 1) };
    let parallelism = if n * w.len() < SHARED { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    let view = HostView::new(x);
    out.on_host(|sum, m| {
        assert!(to.end <= m && sum.len() == n * m, "columns {to:?} of {m}, rows {n}");
        // SAFETY: all ranges are in bounds of their matrices, checked above; `sum` is a matrix of its own.
        unsafe {
            gemm::gemm(
                n,
                to.len(),
                from.len(),
                sum.as_mut_ptr().add(to.start),
                1,
                m as isize,
                true,
                view.as_slice().as_ptr().add(from.start),
                1,
                k as isize,
                w.as_ptr(),
                row,
                column,
                1.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    });
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::pattern;

    #[test]
    fn a_block_of_the_product_is_added() {
        let (a, b) = (pattern([9, 5], 1), pattern([9, 7], 2));
        let (av, bv) = (host::into_vec(a.clone()), host::into_vec(b.clone()));
        for (rows, columns) in [(0..5, 0..7), (1..4, 2..3), (2..2, 0..7)] {
            let mut out = vec![1.0; rows.len() * columns.len()];
            add_transposed_product(&a, rows.clone(), &b, columns.clone(), 0.5, &mut out);
            for (i, row) in rows.clone().enumerate() {
                for (j, column) in columns.clone().enumerate() {
                    let sum: f32 = (0..9).map(|t| av[t * 5 + row] * bv[t * 7 + column]).sum();
                    assert!((out[i * columns.len() + j] - 1.0 - 0.5 * sum).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn blocks_of_products_are_added_to_their_columns() {
        let (x, w) = (pattern([4, 6], 1), pattern([3, 2], 2));
        let (xv, wv) = (host::into_vec(x.clone()), host::into_vec(w));
        let mut forward = RowAccumulator::zeros(4, 5, &x.device());
        add_block_product(&mut forward, &x, &wv, 1..4, 4..6, false);
        let mut backward = RowAccumulator::zeros(4, 7, &x.device());
        add_block_product(&mut backward, &x, &wv, 1..4, 4..6, true);
        let (forward, backward) = (host::into_vec(forward.into_tensor()), host::into_vec(backward.into_tensor()));
        for t in 0..4 {
            for i in 0..5 {
                let expected = match i {
                    1..4 => (0..2).map(|j| xv[t * 6 + 4 + j] * wv[(i - 1) * 2 + j]).sum(),
                    _ => 0.0,
                };
                assert!((forward[t * 5 + i] - expected).abs() < 1e-6);
            }
            for j in 0..7 {
                let expected = match j {
                    4..6 => (0..3).map(|i| xv[t * 6 + 1 + i] * wv[i * 2 + j - 4]).sum(),
                    _ => 0.0,
                };
                assert!((backward[t * 7 + j] - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_large_product_is_the_same_in_blocks() {
        let (a, b) = (pattern([300, 96], 3), pattern([300, 120], 4));
        let mut whole = vec![0.0; 96 * 120];
        add_transposed_product(&a, 0..96, &b, 0..120, 1.0, &mut whole);
        let mut block = vec![0.0; 32 * 40];
        add_transposed_product(&a, 32..64, &b, 80..120, 1.0, &mut block);
        for i in 0..32 {
            for j in 0..40 {
                assert!((block[i * 40 + j] - whole[(32 + i) * 120 + 80 + j]).abs() < 1e-4);
            }
        }
    }
}
