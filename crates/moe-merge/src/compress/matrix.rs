//! One matrix.

use crate::Result;
use crate::linalg::{product, product_into, truncated_svd, view};

/// A matrix `[rows, cols]` as `L R + S`, S with few rows. The sum is never formed to multiply with it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LowRankSparse {
    /// Rows of the matrix, `d_1`: its outputs.
    pub rows: usize,
    /// Columns, `d_2`: its inputs.
    pub cols: usize,
    /// Rank, r.
    pub rank: usize,
    /// `L [d_1, r]`.
    pub left: Vec<f32>,
    /// `R [r, d_2]`.
    pub right: Vec<f32>,
    /// Rows of S that are there, ascending.
    pub kept: Vec<u32>,
    /// Those rows `[kept, d_2]`.
    pub sparse: Vec<f32>,
}

impl LowRankSparse {
    /// The low-rank part of a matrix, with all rows of S: nothing is lost yet but the rounding of S.
    ///
    /// # Errors
    /// [`Error::Numerics`](crate::Error::Numerics) for values that are not finite.
    pub fn split(matrix: &[f32], rows: usize, cols: usize, rank: usize) -> Result<Self> {
        if rows == 0 || cols == 0 {
            return Ok(Self { rows, cols, kept: (0..rows as u32).collect(), ..Self::default() });
        }
        let svd = truncated_svd(matrix, cols, rank)?;
        let rank = svd.values.len();
        let roots: Vec<f32> = svd.values.iter().map(|value| value.sqrt() as f32).collect();
        let mut left = svd.scores;
        for row in left.chunks_exact_mut(rank.max(1)) {
            row.iter_mut().zip(&roots).for_each(|(v, root)| *v = if *root > 0.0 { *v / root } else { 0.0 });
        }
        let right = (0..rank * cols).map(|k| roots[k / cols] * svd.directions[(k % cols) * rank + k / cols]).collect();
        let mut split = Self { rows, cols, rank, left, right, kept: (0..rows as u32).collect(), sparse: vec![] };
        let low = split.low_rank();
        split.sparse = matrix.iter().zip(&low).map(|(w, low)| w - low).collect();
        Ok(split)
    }

    /// The same with these rows of S only.
    pub fn keep_rows(mut self, kept: &[u32]) -> Self {
        let cols = self.cols;
        let at = |row: &u32| self.kept.binary_search(row).ok();
        self.sparse =
            kept.iter().filter_map(at).flat_map(|at| &self.sparse[at * cols..(at + 1) * cols]).copied().collect();
        self.kept = kept.to_vec();
        self
    }

    /// `L R [d_1, d_2]`.
    fn low_rank(&self) -> Vec<f32> {
        product(view(&self.left, self.rows, self.rank), view(&self.right, self.rank, self.cols))
    }

    /// The matrix itself `[d_1, d_2]`: for evaluation and tests.
    pub fn dense(&self) -> Vec<f32> {
        let mut dense = self.low_rank();
        for (row, values) in self.kept.iter().zip(self.sparse.chunks_exact(self.cols.max(1))) {
            let into = &mut dense[*row as usize * self.cols..(*row as usize + 1) * self.cols];
            into.iter_mut().zip(values).for_each(|(d, v)| *d += v);
        }
        dense
    }

    /// Parameters of the low-rank part and of the rows, `r (d_1 + d_2) + kept * d_2`.
    pub fn parameters(&self) -> usize {
        self.left.len() + self.right.len() + self.sparse.len()
    }

    /// `x (L R + S)^T` of inputs `[n, d_2]`: `[n, d_1]`, in `2 n (r (d_1 + d_2) + kept d_2)` operations.
    pub fn forward(&self, inputs: &[f32]) -> Vec<f32> {
        let n = inputs.len() / self.cols.max(1);
        let x = view(inputs, n, self.cols);
        let inner = product(x, view(&self.right, self.rank, self.cols).transpose()); // [n, r]
        let mut out = vec![0.0; n * self.rows];
        product_into(&mut out, false, view(&inner, n, self.rank), view(&self.left, self.rows, self.rank).transpose());
        if self.kept.is_empty() {
            return out;
        }
        let rows = product(x, view(&self.sparse, self.kept.len(), self.cols).transpose()); // [n, kept]
        for (out, rows) in out.chunks_exact_mut(self.rows).zip(rows.chunks_exact(self.kept.len())) {
            self.kept.iter().zip(rows).for_each(|(row, value)| out[*row as usize] += value);
        }
        out
    }
}
