//! Products of a few rows with a matrix, as generation asks for: the matrix is read once, where and as it lies.
//!
//! A product of many rows first copies both factors into panels, which pays when every element is used hundreds of
//! times. A step of generation gives an expert a handful of rows: there the copy of the matrix costs more than the
//! product. Each element of the result is a sum of its own in a fixed order, so that it does not depend on the other
//! rows.

use std::ops::RangeInclusive;

use multiversion::multiversion;
use rayon::prelude::*;

/// Numbers of rows that are multiplied this way. One row is a product that panels have no part in anyway.
pub(super) const NUMBERS: RangeInclusive<usize> = 2..=12;

/// Multiply-adds from which on a product is shared between threads.
const SHARED: usize = 1 << 19;

/// Rows of the matrix in a piece of work.
const PIECE: usize = 64;

/// Partial sums of an element of the result.
const LANES: usize = 16;

/// Rows of the matrix in a tile.
const TILE: usize = 4;

/// `x w^T`, row-major, of `x [n, width]` and `w [outputs, width]`.
pub(super) fn multiply(x: &[f32], w: &[f32], width: usize) -> Vec<f32> {
    let (n, outputs) = (x.len() / width, w.len() / width);
    let x = Rows::new(x, width);
    // As many rows as the matrix has, so that threads write to ranges of their own.
    let mut turned = vec![0.0f32; outputs * n];
    let pieces = turned.chunks_mut(PIECE * n).zip(w.chunks(PIECE * width));
    match n * w.len() < SHARED {
        true => pieces.for_each(|(out, w)| x.times(w, out)),
        false => pieces.collect::<Vec<_>>().into_par_iter().for_each(|(out, w)| x.times(w, out)),
    }
    if n == 1 {
        return turned;
    }
    let mut out = vec![0.0f32; outputs * n];
    for (row, out) in out.chunks_exact_mut(outputs).enumerate() {
        out.iter_mut().zip(turned.iter().skip(row).step_by(n)).for_each(|(out, v)| *out = *v);
    }
    out
}

/// The few rows, in groups whose elements lie as they are used: [`LANES`] of the first row of a group, of the second,
/// and so on; then the next ones. Zeros fill the last.
struct Rows {
    values: Vec<[f32; LANES]>,
    n: usize,
    width: usize,
}

impl Rows {
    fn new(x: &[f32], width: usize) -> Self {
        let (n, steps) = (x.len() / width, width.div_ceil(LANES));
        let mut values = vec![[0.0; LANES]; n * steps];
        for (first, size) in groups(n) {
            for row in 0..size {
                let from = &x[(first + row) * width..(first + row + 1) * width];
                for (step, from) in from.chunks(LANES).enumerate() {
                    values[first * steps + step * size + row][..from.len()].copy_from_slice(from);
                }
            }
        }
        Self { values, n, width }
    }

    /// `w x^T`, row-major.
    fn times(&self, w: &[f32], out: &mut [f32]) {
        tiles(&self.values, self.n, w, self.width, out);
    }
}

/// First row and size of each group.
fn groups(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let size = match n - first {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        first += size;
        Some((first - size, size))
    })
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn tiles(x: &[[f32; LANES]], n: usize, w: &[f32], width: usize, out: &mut [f32]) {
    let steps = width.div_ceil(LANES);
    for (w, out) in w.chunks(TILE * width).zip(out.chunks_mut(TILE * n)) {
        for (first, size) in groups(n) {
            let (x, out) = (&x[first * steps..(first + size) * steps], &mut out[first..]);
            match (size, w.len() == TILE * width) {
                (4, true) => tile::<TILE, 4>(x, w, width, out, n),
                (2, true) => tile::<TILE, 2>(x, w, width, out, n),
                (_, true) => tile::<TILE, 1>(x, w, width, out, n),
                (4, false) => last_rows::<4>(x, w, width, out, n),
                (2, false) => last_rows::<2>(x, w, width, out, n),
                (_, false) => last_rows::<1>(x, w, width, out, n),
            }
        }
    }
}

/// Rows of the matrix that fill no tile.
#[inline(always)]
fn last_rows<const X: usize>(x: &[[f32; LANES]], w: &[f32], width: usize, out: &mut [f32], n: usize) {
    for (row, w) in w.chunks_exact(width).enumerate() {
        tile::<1, X>(x, w, width, &mut out[row * n..], n);
    }
}

/// `out[i, j]` of row `i` of the matrix and row `j` of a group.
// Loops over indices of arrays are what compilers keep in registers here.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn tile<const W: usize, const X: usize>(x: &[[f32; LANES]], w: &[f32], width: usize, out: &mut [f32], n: usize) {
    let mut sums = [[[0.0f32; LANES]; X]; W];
    let whole = width / LANES;
    for step in 0..whole {
        let mut right = [[0.0; LANES]; X];
        for j in 0..X {
            right[j] = x[step * X + j];
        }
        for i in 0..W {
            let first = i * width + step * LANES;
            let mut left = [0.0; LANES];
            left.copy_from_slice(&w[first..first + LANES]);
            for j in 0..X {
                for lane in 0..LANES {
                    sums[i][j][lane] = left[lane].mul_add(right[j][lane], sums[i][j][lane]);
                }
            }
        }
    }
    for i in 0..W {
        let tail = &w[i * width + whole * LANES..(i + 1) * width];
        for j in 0..X {
            let mut sum = sums[i][j].iter().sum::<f32>();
            if !tail.is_empty() {
                sum += tail.iter().zip(&x[whole * X + j]).map(|(w, x)| w * x).sum::<f32>();
            }
            out[i * n + j] = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 11) % 29) as f32 / 14.0 - 1.0).collect()
    }

    #[test]
    fn products_are_those_of_the_definition_and_do_not_depend_on_the_other_rows() {
        for (n, width, outputs) in [(1, 5, 3), (3, 16, 4), (7, 100, 65), (16, 130, 200), (9, 1024, 130)] {
            let (x, w) = (numbers(n * width, 1), numbers(outputs * width, 2));
            let found = multiply(&x, &w, width);
            for (i, row) in found.chunks_exact(outputs).enumerate() {
                for (j, value) in row.iter().enumerate() {
                    let pairs = x[i * width..(i + 1) * width].iter().zip(&w[j * width..(j + 1) * width]);
                    let exact: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    assert!((f64::from(*value) - exact).abs() < 1e-4, "{value} {exact}");
                }
                assert_eq!(multiply(&x[i * width..(i + 1) * width], &w, width), row);
            }
        }
    }
}
