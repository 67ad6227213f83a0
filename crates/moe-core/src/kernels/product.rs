//! Products of matrices in host memory.
//!
//! What a low-rank adapter multiplies is thin: a few tokens of an expert, a rank of eight. There the cost of a call is
//! what counts, so these work on slices, with no tensor in between.

use std::ops::Range;

/// Multiply-adds from which on a product is shared between threads.
const SHARED: usize = 1 << 21;

/// A matrix in a slice, any two of whose neighbors are a fixed number of elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major values, `columns` to a row.
    ///
    /// # Panics
    /// If the last row is not whole.
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "values of a {rows} x {columns} matrix");
        Self { values, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Some of its columns.
    ///
    /// # Panics
    /// If there are fewer, or if it is transposed.
    pub fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns, "{range:?} of {} columns", self.columns);
        assert_eq!(self.column_stride, 1, "columns of a transposed matrix");
        let values = if self.values.is_empty() { self.values } else { &self.values[range.start..] };
        Self { values, columns: range.len(), ..self }
    }

    /// Its transpose.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// `out[i, first + j] (+)= factor * sum_k a[i, k] b[k, j]`, where `out` is row-major, `width` to a row: added with
/// `add`, else in place of what was there.
///
/// # Panics
/// If the sizes do not fit.
pub fn product(out: &mut [f32], width: usize, first: usize, add: bool, factor: f32, a: Matrix<'_>, b: Matrix<'_>) {
    check(&a, &b);
    assert_eq!(out.len(), a.rows * width, "{} rows of {width}", a.rows);
    assert!(first + b.columns <= width, "{} columns from {first} of {width}", b.columns);
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    if a.columns == 0 {
        if !add {
            out.chunks_exact_mut(width).for_each(|row| row[first..first + b.columns].fill(0.0));
        }
        return;
    }
    // SAFETY: the product is within `out`, which is borrowed mutably, and its values may be read.
    unsafe { multiply(out.as_mut_ptr().add(first), width, add, factor, a, b) };
}

/// `a b`, row-major, in memory that nothing was written to before.
///
/// # Panics
/// If the sizes do not fit.
pub fn new_product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    check(&a, &b);
    let len = a.rows * b.columns;
    if a.columns == 0 || len == 0 {
        return vec![0.0; len];
    }
    let mut out = Vec::with_capacity(len);
    // SAFETY: there is room for all rows; nothing of it is read, and all of it is written.
    unsafe {
        multiply(out.as_mut_ptr(), b.columns, false, 1.0, a, b);
        out.set_len(len);
    }
    out
}

fn check(a: &Matrix<'_>, b: &Matrix<'_>) {
    assert_eq!(a.columns, b.rows, "columns of the first factor and rows of the second");
    for matrix in [a, b].into_iter().filter(|matrix| matrix.rows > 0 && matrix.columns > 0) {
        let last = (matrix.rows - 1) * matrix.row_stride + (matrix.columns - 1) * matrix.column_stride;
        assert!(last < matrix.values.len(), "a matrix within its values");
    }
}

/// # Safety
/// Both factors are [checked](check) and not empty; `out` is valid for `a.rows` rows `width` apart, for reads, too, if
/// `add` is set.
unsafe fn multiply(out: *mut f32, width: usize, add: bool, factor: f32, a: Matrix<'_>, b: Matrix<'_>) {
    let work = a.rows * a.columns * b.columns;
    let parallelism = if work < SHARED { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    // SAFETY: as the caller says.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            width as isize,
            add,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 11) % 29) as f32 / 14.0 - 1.0).collect()
    }

    #[test]
    fn blocks_and_transposes_are_multiplied_in_place() {
        let (a, b) = (numbers(5 * 7, 1), numbers(3 * 4, 2));
        // a[:, 2..6] b^T, into columns 1..4 of 6
        let mut out = vec![1.0; 5 * 6];
        let factors = (Matrix::new(&a, 5, 7).columns(2..6), Matrix::new(&b, 3, 4).transposed());
        product(&mut out, 6, 1, true, 0.5, factors.0, factors.1);
        for i in 0..5 {
            for j in 0..6 {
                let sum: f32 = match j {
                    1..4 => (0..4).map(|k| a[i * 7 + 2 + k] * b[(j - 1) * 4 + k]).sum(),
                    _ => 0.0,
                };
                assert!((out[i * 6 + j] - 1.0 - 0.5 * sum).abs() < 1e-5);
            }
        }
        product(&mut out, 6, 1, false, 1.0, factors.0, factors.1);
        assert!((out[1] - (0..4).map(|k| a[2 + k] * b[k]).sum::<f32>()).abs() < 1e-5 && out[0] == 1.0);
    }

    #[test]
    fn nothing_is_a_matrix_too() {
        let mut out = vec![3.0; 4];
        product(&mut out, 2, 0, false, 1.0, Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 2));
        assert_eq!(out, [0.0; 4]);
        product(&mut [], 2, 0, true, 1.0, Matrix::new(&[], 0, 3), Matrix::new(&[1.0; 6], 3, 2));
    }
}
