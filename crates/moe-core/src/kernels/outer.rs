//! Gradients of weights: products of transposed matrices, added in place.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::host::{self, HostView};

/// Multiply-adds from which on a product is shared between threads.
const SHARED: usize = 1 << 21;

/// `out[i, j] += factor * sum_t a[t, rows.start + i] * b[t, columns.start + j]` for `a [n, m]`, `b [n, k]` and `out [rows.len(), columns.len()]`: a
/// block of the gradient `dy^T x` of a weight.
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
