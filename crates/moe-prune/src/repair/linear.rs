//! The dense linear algebra of refits, in f64.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{Llt, Solve};
use faer::{Accum, Mat, MatRef, Par, Side};
use rayon::prelude::*;

/// Rows converted to f64 at a time. Part of the numerics.
const ROWS: usize = 256;

/// A row-major f32 matrix.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub values: &'a [f32],
    pub columns: usize,
}

impl Rows<'_> {
    pub fn rows(&self) -> usize {
        self.values.len() / self.columns.max(1)
    }

    fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.columns..(i + 1) * self.columns]
    }

    /// All of it in f64.
    pub fn to_mat(self) -> Mat<f64> {
        Mat::from_fn(self.rows(), self.columns, |i, j| f64::from(self.values[i * self.columns + j]))
    }
}

/// The values row by row, in f32.
pub(super) fn to_rows(matrix: MatRef<'_, f64>) -> Vec<f32> {
    (0..matrix.nrows()).flat_map(|i| (0..matrix.ncols()).map(move |j| matrix[(i, j)] as f32)).collect()
}

/// `sum += sum_t weights[t] a[t] b[t, columns]^T`: adds `[a.columns, columns.len()]`.
pub(super) fn add_gram(sum: &mut Mat<f64>, a: Rows<'_>, b: Rows<'_>, columns: &[u32], weights: impl Fn(usize) -> f64) {
    for start in (0..a.rows()).step_by(ROWS) {
        let n = ROWS.min(a.rows() - start);
        let left = Mat::from_fn(n, a.columns, |i, j| weights(start + i) * f64::from(a.row(start + i)[j]));
        let right = Mat::from_fn(n, columns.len(), |i, j| f64::from(b.row(start + i)[columns[j] as usize]));
        matmul(sum.as_mut(), Accum::Add, left.transpose(), right.as_ref(), 1.0, Par::Seq);
    }
}

/// The sum of the diagonal and its length.
pub(super) fn diagonal(a: &Mat<f64>) -> (f64, usize) {
    ((0..a.nrows()).map(|i| a[(i, i)]).sum(), a.nrows())
}

/// The normal equations of one expert: `A + lambda I`, factored.
pub(super) struct Normal {
    factor: Llt<f64>,
    pub lambda: f64,
}

impl Normal {
    /// Nothing if A is zero or has no Cholesky factor.
    pub fn new(mut a: Mat<f64>, lambda: f64) -> Option<Self> {
        let (sum, n) = diagonal(&a);
        if !(sum > 0.0 && lambda > 0.0 && lambda.is_finite()) {
            return None;
        }
        (0..n).for_each(|i| a[(i, i)] += lambda);
        Llt::new(a.as_ref(), Side::Lower).ok().map(|factor| Self { factor, lambda })
    }

    /// X with `X (A + lambda I) = C`, for `C [H, K]`.
    pub fn solve(&self, c: MatRef<'_, f64>) -> Mat<f64> {
        let mut x = c.transpose().to_owned(); // [K, H]
        self.factor.solve_in_place(x.as_mut());
        x.transpose().to_owned()
    }
}

/// `sum_t r[rows[t]] u[t]^T`, `[r.columns, u.columns]`, blocks of columns of r in parallel.
pub(super) fn cross(r: Rows<'_>, rows: &[u32], u: Rows<'_>) -> Mat<f64> {
    const COLUMNS: usize = 128;
    let blocks: Vec<(usize, Mat<f64>)> = (0..r.columns)
        .into_par_iter()
        .step_by(COLUMNS)
        .map(|first| {
            let width = COLUMNS.min(r.columns - first);
            let mut sum = Mat::zeros(width, u.columns);
            for start in (0..rows.len()).step_by(ROWS) {
                let n = ROWS.min(rows.len() - start);
                let left = Mat::from_fn(n, width, |i, j| f64::from(r.row(rows[start + i] as usize)[first + j]));
                let right = Mat::from_fn(n, u.columns, |i, j| f64::from(u.row(start + i)[j]));
                matmul(sum.as_mut(), Accum::Add, left.transpose(), right.as_ref(), 1.0, Par::Seq);
            }
            (first, sum)
        })
        .collect();
    let mut all = Mat::zeros(r.columns, u.columns);
    for (first, block) in blocks {
        all.as_mut().subrows_mut(first, block.nrows()).copy_from(&block);
    }
    all
}

/// `r[rows[t]] -= D u[t]` for `D [H, K]`. `rows` must not repeat.
pub(super) fn subtract(r: &mut [f32], hidden: usize, rows: &[u32], u: Rows<'_>, d: MatRef<'_, f64>) {
    let pieces: Vec<(usize, Mat<f64>)> = (0..rows.len())
        .into_par_iter()
        .step_by(ROWS)
        .map(|start| {
            let n = ROWS.min(rows.len() - start);
            let units = Mat::from_fn(n, u.columns, |i, j| f64::from(u.row(start + i)[j]));
            let mut out = Mat::zeros(n, hidden);
            matmul(out.as_mut(), Accum::Replace, units.as_ref(), d.transpose(), 1.0, Par::Seq);
            (start, out)
        })
        .collect();
    for (start, piece) in pieces {
        for i in 0..piece.nrows() {
            let at = rows[start + i] as usize * hidden;
            r[at..at + hidden].iter_mut().enumerate().for_each(|(h, r)| *r -= piece[(i, h)] as f32);
        }
    }
}

/// Sum of the squares, in f64.
pub(super) fn squares(values: &[f32]) -> f64 {
    values
        .par_chunks(1 << 14)
        .map(|piece| piece.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>())
        .collect::<Vec<_>>()
        .into_iter()
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i * 37 + seed * 101) * 2_654_435_761usize) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    #[test]
    fn sums_over_rows_are_the_plain_ones() {
        let (n, a, b, h) = (300, 5, 7, 131);
        let (x, y, r) = (values(n * a, 1), values(n * b, 2), values(400 * h, 3));
        let weight = |t: usize| t as f64 * 0.01;
        let mut sum = Mat::zeros(a, 2);
        let (x_rows, y_rows) = (Rows { values: &x, columns: a }, Rows { values: &y, columns: b });
        add_gram(&mut sum, x_rows, y_rows, &[1, 6], weight);
        let plain: f64 = (0..n).map(|t| weight(t) * f64::from(x[t * a + 3]) * f64::from(y[t * b + 6])).sum();
        assert!((sum[(3, 1)] - plain).abs() < 1e-9);

        let rows: Vec<u32> = (0..n as u32).map(|t| (t * 7) % 400).collect();
        let found = cross(Rows { values: &r, columns: h }, &rows, x_rows);
        let plain: f64 = (0..n).map(|t| f64::from(r[rows[t] as usize * h + 130]) * f64::from(x[t * a + 2])).sum();
        assert!((found[(130, 2)] - plain).abs() < 1e-9);

        let mut less = r.clone();
        let d = Mat::from_fn(h, a, |i, j| (i as f64 - 3.0 * j as f64) * 0.01);
        subtract(&mut less, h, &rows, x_rows, d.as_ref());
        let at = rows[299] as usize * h + 9;
        let plain: f64 = (0..a).map(|j| d[(9, j)] * f64::from(x[299 * a + j])).sum();
        assert!((f64::from(r[at]) - plain - f64::from(less[at])).abs() < 1e-5);
        assert!((squares(&[3.0, -4.0]) - 25.0).abs() < 1e-12);
    }

    #[test]
    fn a_zero_matrix_has_no_solution() {
        let a = Mat::from_fn(2, 2, |i, j| if i == j { 2.0 } else { 1.0 });
        assert_eq!(diagonal(&a), (4.0, 2));
        let normal = Normal::new(a, 1.0).unwrap();
        let x = normal.solve(Mat::from_fn(1, 2, |_, j| j as f64).as_ref());
        // x (3 1; 1 3) = (0 1)
        assert!((x[(0, 0)] + 0.125).abs() < 1e-12 && (x[(0, 1)] - 0.375).abs() < 1e-12);
        assert!(Normal::new(Mat::zeros(3, 3), 0.5).is_none());
        assert!(Normal::new(Mat::zeros(0, 0), 0.5).is_none());
    }
}
