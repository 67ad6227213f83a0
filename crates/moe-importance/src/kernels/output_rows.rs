//! Everything that is read off the outputs of an expert, row by row and column by column.

use burn::tensor::Tensor;
use moe_core::host::{self, HostView};
use multiversion::multiversion;
use rayon::prelude::*;

/// Columns per parallel piece of a column pass.
const BLOCK: usize = 64;
/// Rows whose sums are f32, before they are carried in f64.
const ROWS: usize = 32;
/// Rows per parallel piece of a row pass.
const PIECE: usize = 16;

/// What one row of outputs is, beside its input.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Row {
    /// `|f|^2`.
    pub square: f32,
    /// `max_h |f[h]|`.
    pub max: f32,
    /// `x . f`, 0 unless inputs were given.
    pub dot: f32,
    /// `|x|^2`, 0 unless inputs were given.
    pub input_square: f32,
}

/// One [`Row`] for each row of `outputs [n, H]`, in one pass.
pub(crate) fn output_rows(outputs: &Tensor<2>, inputs: Option<&Tensor<2>>) -> Vec<Row> {
    let [n, hidden] = outputs.dims();
    if n == 0 || hidden == 0 {
        return vec![Row::default(); n];
    }
    if !host::is_host(&outputs.device()) {
        return output_rows_on_device(outputs, inputs);
    }
    let (outputs, inputs) = (HostView::new(outputs), inputs.map(HostView::new));
    let (outputs, inputs) = (outputs.as_slice(), inputs.as_ref().map(HostView::as_slice));
    let mut rows = vec![Row::default(); n];
    rows.par_iter_mut().with_min_len(PIECE).enumerate().for_each(|(t, row)| {
        let at = t * hidden..(t + 1) * hidden;
        *row = match inputs {
            Some(inputs) => row_beside(&outputs[at.clone()], &inputs[at]),
            None => row_alone(&outputs[at]),
        };
    });
    rows
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn row_alone(f: &[f32]) -> Row {
    let (mut square, mut max) = ([0.0f32; 16], [0.0f32; 16]);
    let (chunks, tail) = f.as_chunks::<16>();
    for f in chunks {
        for i in 0..16 {
            square[i] += f[i] * f[i];
            max[i] = max[i].max(f[i].abs());
        }
    }
    let mut row = Row { square: square.iter().sum(), max: max.iter().copied().fold(0.0, f32::max), ..Row::default() };
    for f in tail {
        row.square += f * f;
        row.max = row.max.max(f.abs());
    }
    row
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn row_beside(f: &[f32], x: &[f32]) -> Row {
    let [mut square, mut max, mut dot, mut input] = [[0.0f32; 16]; 4];
    let ((f, f_tail), (x, x_tail)) = (f.as_chunks::<16>(), x.as_chunks::<16>());
    for (f, x) in f.iter().zip(x) {
        for i in 0..16 {
            square[i] += f[i] * f[i];
            max[i] = max[i].max(f[i].abs());
            dot[i] += f[i] * x[i];
            input[i] += x[i] * x[i];
        }
    }
    let mut row = Row {
        square: square.iter().sum(),
        max: max.iter().copied().fold(0.0, f32::max),
        dot: dot.iter().sum(),
        input_square: input.iter().sum(),
    };
    for (f, x) in f_tail.iter().zip(x_tail) {
        row.square += f * f;
        row.max = row.max.max(f.abs());
        row.dot += f * x;
        row.input_square += x * x;
    }
    row
}

/// The body for any device.
fn output_rows_on_device(outputs: &Tensor<2>, inputs: Option<&Tensor<2>>) -> Vec<Row> {
    let mut columns = vec![outputs.clone().powi_scalar(2).sum_dim(1), outputs.clone().abs().max_dim(1)]; // [n, 1] each
    if let Some(inputs) = inputs {
        columns.push((outputs.clone() * inputs.clone()).sum_dim(1));
        columns.push(inputs.clone().powi_scalar(2).sum_dim(1));
    }
    let count = columns.len();
    let values = host::into_vec(Tensor::cat(columns, 1)); // [n, count]
    let row = |values: &[f32]| {
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        Row { square: at(0), max: at(1), dot: at(2), input_square: at(3) }
    };
    values.chunks_exact(count).map(row).collect()
}

/// Mean of the rows of `outputs [n, H]` and their summed squared deviations from it, `[H]` each: two passes over each
/// block of columns, since a sum of squares would cancel.
pub(crate) fn column_moments(outputs: &Tensor<2>) -> (Vec<f64>, Vec<f64>) {
    let [n, hidden] = outputs.dims();
    if n == 0 || hidden == 0 {
        return (vec![0.0; hidden], vec![0.0; hidden]);
    }
    if !host::is_host(&outputs.device()) {
        let mean = outputs.clone().mean_dim(0); // [1, H]
        let squares = (outputs.clone() - mean.clone()).powi_scalar(2).sum_dim(0);
        let wide = |tensor| host::into_vec::<2>(tensor).into_iter().map(f64::from).collect();
        return (wide(mean), wide(squares));
    }
    let view = HostView::new(outputs);
    let values = view.as_slice();
    let (mut mean, mut squares) = (vec![0.0; hidden], vec![0.0; hidden]);
    mean.par_chunks_mut(BLOCK).zip(squares.par_chunks_mut(BLOCK)).enumerate().for_each(|(block, (mean, squares))| {
        block_moments(values, hidden, block * BLOCK, mean, squares);
    });
    (mean, squares)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn block_moments(values: &[f32], hidden: usize, first: usize, mean: &mut [f64], squares: &mut [f64]) {
    let (n, width) = (values.len() / hidden, mean.len());
    add_columns(values, hidden, first, mean, &[0.0; BLOCK], |x, _| x);
    mean.iter_mut().for_each(|mean| *mean /= n as f64);
    let mut around = [0.0f32; BLOCK];
    around[..width].iter_mut().zip(&*mean).for_each(|(around, mean)| *around = *mean as f32);
    add_columns(values, hidden, first, squares, &around, |x, mean| (x - mean) * (x - mean));
    for ((squares, mean), around) in squares.iter_mut().zip(&*mean).zip(around) {
        // The mean was rounded to f32 to subtract it.
        *squares = (*squares - n as f64 * (mean - f64::from(around)).powi(2)).max(0.0);
    }
}

/// `out[j] += sum_t f(values[t, first + j], around[j])`.
#[inline(always)]
fn add_columns(
    values: &[f32],
    hidden: usize,
    first: usize,
    out: &mut [f64],
    around: &[f32; BLOCK],
    f: impl Fn(f32, f32) -> f32,
) {
    let width = out.len();
    for rows in values.chunks(ROWS * hidden) {
        let mut partial = [0.0f32; BLOCK];
        for row in rows.chunks_exact(hidden) {
            let row = &row[first..first + width];
            if let Ok(row) = <&[f32; BLOCK]>::try_from(row) {
                for j in 0..BLOCK {
                    partial[j] += f(row[j], around[j]);
                }
            } else {
                partial.iter_mut().zip(row).zip(around).for_each(|((p, x), mean)| *p += f(*x, *mean));
            }
        }
        out.iter_mut().zip(partial).for_each(|(out, p)| *out += f64::from(p));
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn matrix(n: usize, hidden: usize, salt: usize) -> (Vec<f32>, Tensor<2>) {
        let values: Vec<f32> = (0..n * hidden).map(|i| ((i + salt) * 7919 % 2003) as f32 * 1e-3 - 1.0).collect();
        (values.clone(), host::from_vec(values, [n, hidden], &Device::flex()))
    }

    #[test]
    fn rows_are_norms_maxima_and_products() {
        for (n, hidden) in [(1, 1), (5, 16), (40, 33), (3, 130)] {
            let ((f, outputs), (x, inputs)) = (matrix(n, hidden, 1), matrix(n, hidden, 500));
            let bodies = [output_rows(&outputs, Some(&inputs)), output_rows_on_device(&outputs, Some(&inputs))];
            for rows in bodies {
                for (t, row) in rows.into_iter().enumerate() {
                    let (f, x) = (&f[t * hidden..][..hidden], &x[t * hidden..][..hidden]);
                    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                    let max = f.iter().fold(0.0f32, |max, f| max.max(f.abs()));
                    assert_eq!(row.max, max);
                    for (found, expected) in
                        [(row.square, dot(f, f)), (row.dot, dot(f, x)), (row.input_square, dot(x, x))]
                    {
                        assert!((found - expected).abs() < 1e-4, "{found}, expected {expected}");
                    }
                }
            }
            let alone = output_rows(&outputs, None);
            assert!(alone.iter().all(|row| (row.dot, row.input_square) == (0.0, 0.0)));
        }
    }

    #[test]
    fn moments_survive_a_mean_far_from_zero() {
        for (n, hidden) in [(1, 3), (70, 130), (33, 64)] {
            let (mut values, _) = matrix(n, hidden, 9);
            values.iter_mut().enumerate().for_each(|(i, v)| *v = 1000.0 + (i % 8) as f32 / 8.0);
            let outputs = host::from_vec(values.clone(), [n, hidden], &Device::flex());
            let (mean, squares) = column_moments(&outputs);
            for h in 0..hidden {
                let column = || (0..n).map(|t| f64::from(values[t * hidden + h]));
                let expected = column().sum::<f64>() / n as f64;
                let spread: f64 = column().map(|v| (v - expected).powi(2)).sum();
                assert!((mean[h] - expected).abs() < 1e-4, "{} and {expected}", mean[h]);
                assert!((squares[h] - spread).abs() < 1e-3 * spread.max(1e-3), "{} and {spread}", squares[h]);
            }
        }
    }
}
