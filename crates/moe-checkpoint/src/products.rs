//! Products of f32 matrices on the host, blocked and parallel over rows.
//!
//! Every block of rows is one sequential product, so that results do not depend on the number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows of a block of a product with `rows` rows: eight blocks or so, for as many threads, but not so small that
/// packing the other matrix anew for each costs more than the block, nor so large that it does not matter any more.
fn block_rows(rows: usize) -> usize {
    rows.div_ceil(8).next_multiple_of(32).clamp(96, 384)
}

/// A row-major matrix `[rows, cols]`.
pub fn view(values: &[f32], rows: usize, cols: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(values, rows, cols)
}

/// Writes `a b` of `a [m, k]` and `b [k, n]` into `out`, or adds it to what is there; `out` is row-major `[m, n]`.
pub fn product_into(out: &mut [f32], add: bool, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let n = b.ncols();
    if n == 0 || a.nrows() == 0 {
        return;
    }
    let beta = if add { Accum::Add } else { Accum::Replace };
    let block = block_rows(a.nrows());
    out.par_chunks_mut(block * n).enumerate().for_each(|(at, out)| {
        let rows = out.len() / n;
        let into = MatMut::from_row_major_slice_mut(out, rows, n);
        matmul(into, beta, a.subrows(at * block, rows), b, 1.0, Par::Seq);
    });
}

/// The product `a b` of `a [m, k]` and `b [k, n]`, row-major `[m, n]`.
pub fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let mut out = vec![0.0; a.nrows() * b.ncols()];
    product_into(&mut out, false, a, b);
    out
}

/// Inner products of the rows of `a [m, k]` and `b [n, k]`: `[m, n]`.
pub fn row_products(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (a.len() / k.max(1), b.len() / k.max(1));
    product(view(a, m, k), view(b, n, k).transpose())
}

/// Adds a bias to every row of a row-major matrix; an empty one is none.
pub fn add_to_rows(values: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        values.par_chunks_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(v, b)| *v += b));
    }
}
