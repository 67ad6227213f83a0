//! Decompositions, sums and distances of matrices on the host.

use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, Side};
use rayon::prelude::*;

pub(crate) use moe_checkpoint::products::{product, product_into, row_products, view};

use crate::{Error, Result};

/// Eigenvectors of a symmetric matrix `[n, n]` in f64 that belong to its `count` largest eigenvalues, as columns,
/// largest first, with the eigenvalues.
pub(crate) fn leading_eigenvectors(matrix: &Mat<f64>, count: usize) -> Result<(Mat<f64>, Vec<f64>)> {
    let n = matrix.nrows();
    let eigen = matrix.self_adjoint_eigen(Side::Lower).map_err(|error| {
        Error::numerics("eigenvectors of a symmetric matrix", moe_checkpoint::human::variant(&error))
    })?;
    let (vectors, values) = (eigen.U(), eigen.S().column_vector());
    // Ascending in the library.
    let column = |j: usize| n - 1 - j;
    let kept = Mat::from_fn(n, count, |i, j| vectors[(i, column(j))]);
    Ok((kept, (0..count).map(|j| values[column(j)]).collect()))
}

/// Solves `x a = b` for `x [m, n]`, with `a [n, n]` symmetric and positive definite and `b [m, n]` row-major.
pub(crate) fn solve_right(a: &Mat<f64>, b: &Mat<f64>) -> Result<Mat<f64>> {
    let llt = Llt::new(a.as_ref(), Side::Lower).map_err(|error| {
        Error::numerics(
            "Cholesky decomposition",
            format!("{}; use a larger ridge", moe_checkpoint::human::variant(&error)),
        )
    })?;
    // a is symmetric: (x a)^T = a x^T.
    Ok(llt.solve(b.transpose()).transpose().to_owned())
}

/// The `[n, n]` sum of outer products of the rows of a row-major `[t, n]` matrix, `x^T x`, each row in f32, pieces in
/// f64.
pub(crate) fn gram_of_rows(x: &[f32], n: usize) -> Mat<f64> {
    cross_gram(x, n, x, n)
}

/// `x^T y` of row-major `x [t, n]` and `y [t, m]`: products of pieces in f32, summed in f64.
pub(crate) fn cross_gram(x: &[f32], n: usize, y: &[f32], m: usize) -> Mat<f64> {
    /// Tokens whose sums are f32.
    const TOKENS: usize = 256;
    let mut sum = vec![0.0f64; n * m];
    let mut piece = vec![0.0f32; n * m];
    for (x, y) in x.chunks(TOKENS * n.max(1)).zip(y.chunks(TOKENS * m.max(1))) {
        let t = x.len() / n.max(1);
        product_into(&mut piece, false, view(x, t, n).transpose(), view(y, t, m));
        sum.par_iter_mut().zip(&piece).with_min_len(1 << 14).for_each(|(sum, p)| *sum += f64::from(*p));
    }
    Mat::from_fn(n, m, |i, j| sum[i * m + j])
}

/// Rounds of the subspace iteration of [`truncated_svd`].
const ROUNDS: usize = 6;
/// Directions beyond those that are kept, for the iteration to converge.
const EXTRA: usize = 8;

/// Leading part of a singular value decomposition `A = U S V^T`.
pub(crate) struct TruncatedSvd {
    /// `U S`, row-major `[n, rank]`.
    pub scores: Vec<f32>,
    /// `V`, row-major `[length, rank]`.
    pub directions: Vec<f32>,
    /// `S`, largest first.
    pub values: Vec<f64>,
}

/// The leading singular triples of a row-major matrix `[n, length]`, at most `rank`, by subspace iteration from a fixed
/// start in the space of the columns: the order of the rows does not matter, and exact triples come out exactly where
/// `rank` is full.
pub(crate) fn truncated_svd(matrix: &[f32], length: usize, rank: usize) -> Result<TruncatedSvd> {
    let n = matrix.len() / length.max(1);
    let kept = rank.min(n).min(length);
    let directions = (kept + EXTRA).min(n).min(length);
    let a = view(matrix, n, length);
    let mut basis = start(length, directions);
    for _ in 0..ROUNDS {
        let image = product(a, view(&basis, length, directions)); // [n, d]
        let back = product(a.transpose(), view(&image, n, directions)); // [length, d]
        basis = orthonormal(&back, length, directions);
    }
    // Rotate to principal axes: the right singular vectors of A V.
    let image = product(a, view(&basis, length, directions));
    let (axes, squares) = leading_eigenvectors(&gram_of_rows(&image, directions), kept)?;
    let axes: Vec<f32> = (0..directions * kept).map(|k| axes[(k / kept, k % kept)] as f32).collect();
    let axes = view(&axes, directions, kept);
    Ok(TruncatedSvd {
        scores: product(view(&image, n, directions), axes),
        directions: product(view(&basis, length, directions), axes),
        values: squares.iter().map(|square| square.max(0.0).sqrt()).collect(),
    })
}

/// Rounds of the subspace iteration of [`leading_directions`], each of which makes all rows again.
const PASSES: usize = 3;

/// Rows of a matrix, some at a time, given to the function it gets.
pub(crate) type Rows<'a> = &'a dyn Fn(&mut dyn FnMut(&[f32])) -> Result<()>;

/// As [`truncated_svd`] of a matrix with `length` columns whose rows are not in memory together: its right singular
/// vectors, row-major `[length, rank]`, and its singular values.
pub(crate) fn leading_directions(length: usize, rank: usize, rows: Rows<'_>) -> Result<(Vec<f32>, Vec<f64>)> {
    let kept = rank.min(length);
    let directions = (kept + EXTRA).min(length);
    let mut basis = start(length, directions);
    for _ in 0..PASSES {
        let mut back = vec![0.0f32; length * directions];
        rows(&mut |rows| {
            let a = view(rows, rows.len() / length.max(1), length);
            let image = product(a, view(&basis, length, directions));
            product_into(&mut back, true, a.transpose(), view(&image, rows.len() / length.max(1), directions));
        })?;
        basis = orthonormal(&back, length, directions);
    }
    let mut gram = Mat::<f64>::zeros(directions, directions);
    rows(&mut |rows| {
        let image = product(view(rows, rows.len() / length.max(1), length), view(&basis, length, directions));
        gram += gram_of_rows(&image, directions);
    })?;
    let (axes, squares) = leading_eigenvectors(&gram, kept)?;
    let axes: Vec<f32> = (0..directions * kept).map(|k| axes[(k / kept, k % kept)] as f32).collect();
    let found = product(view(&basis, length, directions), view(&axes, directions, kept));
    Ok((found, squares.iter().map(|square| square.max(0.0).sqrt()).collect()))
}

/// A start without structure, row-major `[length, directions]`: the mixed bits of the indices, in [-0.5, 0.5).
fn start(length: usize, directions: usize) -> Vec<f32> {
    let mixed = |i: u64| {
        let x = i.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    (0..(length * directions) as u64).map(|i| (mixed(i) >> 40) as f32 / (1 << 24) as f32 - 0.5).collect()
}

/// An orthonormal basis `[rows, cols]` of the columns.
fn orthonormal(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let matrix = Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j]));
    let q = matrix.qr().compute_thin_Q();
    (0..rows * cols).map(|k| q[(k / cols, k % cols)] as f32).collect()
}

/// Sum of products in f64.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let (a, b) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (x, y) in a.0.iter().zip(b.0) {
        for lane in 0..LANES {
            sums[lane] += f64::from(x[lane]) * f64::from(y[lane]);
        }
    }
    let rest: f64 = a.1.iter().zip(b.1).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Divides every row of length `k` by its norm; rows of zeros stay. Gives the norms.
pub(crate) fn normalize_rows(values: &mut [f32], k: usize) -> Vec<f32> {
    values
        .par_chunks_mut(k.max(1))
        .map(|row| {
            let norm = dot(row, row).sqrt();
            if norm > 0.0 {
                row.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
            }
            norm as f32
        })
        .collect()
}

/// The transpose of a row-major matrix `[rows, cols]`.
pub(crate) fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    if rows == 0 || cols == 0 {
        return out;
    }
    out.par_chunks_mut(rows).enumerate().with_min_len(16).for_each(|(col, out)| {
        out.iter_mut().enumerate().for_each(|(row, out)| *out = values[row * cols + col]);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 7919 % 2003) as f32 - 1001.0) * 1e-3
    }

    #[test]
    fn products_are_sums_of_products() {
        for (m, n, k) in [(1, 1, 1), (5, 3, 2), (200, 7, 33), (97, 100, 64)] {
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..n * k).map(|i| value(i + 17)).collect();
            let found = row_products(&a, &b, k);
            let tall = transposed(&b, n, k);
            let again = product(view(&a, m, k), view(&tall, k, n));
            for i in 0..m {
                for j in 0..n {
                    let expected = dot(&a[i * k..(i + 1) * k], &b[j * k..(j + 1) * k]);
                    assert!((f64::from(found[i * n + j]) - expected).abs() < 1e-4);
                    assert!((f64::from(again[i * n + j]) - expected).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn a_system_is_solved_from_the_right() {
        let x: Vec<f32> = (0..60 * 4).map(value).collect();
        let gram = gram_of_rows(&x, 4);
        let expected = Mat::from_fn(3, 4, |i, j| f64::from(value(i * 4 + j + 5)));
        let found = solve_right(&gram, &(&expected * &gram)).unwrap();
        assert!((&found - &expected).norm_max() < 1e-9);
        let (vectors, values) = leading_eigenvectors(&gram, 2).unwrap();
        let image = &gram * &vectors;
        assert!(values[0] >= values[1]);
        for j in 0..2 {
            for i in 0..4 {
                assert!((image[(i, j)] - values[j] * vectors[(i, j)]).abs() < 1e-9 * values[0]);
            }
        }
    }
}
