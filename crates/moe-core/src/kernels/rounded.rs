//! Products of two matrices of activations that are both rounded to bf16, with sums in f32: what attention multiplies.
//! On matrix units where there are any, else by dot products of pairs.

use std::ops::Range;

use super::{
    amx, bf16_dot,
    bf16_dot::{round_pairs, round_row},
    packed::{DEPTH, Line, TILE, ZERO},
};

/// Whether the processor has such products.
pub fn available() -> bool {
    bf16_dot::available()
}

/// A left operand `[m, k]`: rows in lines of 32 numbers, in the order in which the processor reads them.
#[derive(Default)]
pub struct Left {
    lines: Vec<Line>,
    rows: usize,
    depth: usize,
}

/// A right operand `[k, n]`: panels of 16 columns, a line for every pair of neighbors in k.
#[derive(Default)]
pub struct Right {
    lines: Vec<Line>,
    columns: usize,
    depth: usize,
}

/// At least `len` lines, whose content is whatever it was.
fn at_least(lines: &mut Vec<Line>, len: usize) -> &mut [Line] {
    if lines.len() < len {
        lines.resize(len, ZERO);
    }
    &mut lines[..len]
}

impl Left {
    /// Takes `rows` rows of `k` values, of which `row` gives each.
    pub fn take<'a>(&mut self, rows: usize, k: usize, row: impl Fn(usize) -> &'a [f32]) {
        (self.rows, self.depth) = (rows, k.div_ceil(DEPTH));
        // Rows of tiles that are not filled are multiplied, too, and nobody reads what comes of them.
        let lines = at_least(&mut self.lines, rows.next_multiple_of(TILE) * self.depth);
        for i in 0..rows {
            let (first, step) = match amx::available() {
                true => (i / TILE * self.depth * TILE + i % TILE, TILE),
                false => (i * self.depth, 1),
            };
            round_row(&row(i)[..k], &mut lines[first..][..(self.depth - 1) * step + 1], step);
        }
    }
}

impl Right {
    /// Takes `k` rows of `columns` values.
    pub fn take_rows<'a>(&mut self, k: usize, columns: usize, row: impl Fn(usize) -> &'a [f32]) {
        (self.columns, self.depth) = (columns, k.div_ceil(DEPTH));
        let panel = self.depth * TILE;
        let lines = at_least(&mut self.lines, columns.div_ceil(TILE) * panel);
        for pair in 0..panel {
            let lines = &mut lines[pair..];
            if 2 * pair < k {
                let odd = (2 * pair + 1 < k).then(|| &row(2 * pair + 1)[..columns]);
                round_pairs(&row(2 * pair)[..columns], odd, lines, panel);
            } else {
                lines.iter_mut().step_by(panel).for_each(|line| *line = ZERO);
            }
        }
    }

    /// Takes `columns` columns of `k` values.
    pub fn take_columns<'a>(&mut self, columns: usize, k: usize, column: impl Fn(usize) -> &'a [f32]) {
        (self.columns, self.depth) = (columns, k.div_ceil(DEPTH));
        let panel = self.depth * TILE;
        let lines = at_least(&mut self.lines, columns.div_ceil(TILE) * panel);
        let mut rounded = vec![ZERO; self.depth];
        for i in 0..columns.next_multiple_of(TILE) {
            match i < columns {
                true => round_row(&column(i)[..k], &mut rounded, 1),
                false => rounded.fill(ZERO),
            }
            let lines = lines[i / TILE * panel..][..panel].iter_mut();
            let pairs = rounded.iter_mut().flat_map(|line| *line.pairs_mut());
            lines.zip(pairs).for_each(|(line, pair)| line.pairs_mut()[i % TILE] = pair);
        }
    }
}

/// `out = left right[from.., columns]`, or `out += ...` with `add`: all of k of the left operand, from `from` on of the
/// right one. `from` and the first column are multiples of 32; rows of `out` are `stride` elements apart.
///
/// # Safety
/// `out` has as many rows as the left operand, and columns as are asked for.
pub unsafe fn multiply(
    left: &Left,
    right: &Right,
    from: usize,
    columns: Range<usize>,
    add: bool,
    out: *mut f32,
    stride: usize,
) {
    assert!(from.is_multiple_of(DEPTH) && columns.start.is_multiple_of(DEPTH), "whole tiles");
    assert!(from / DEPTH + left.depth <= right.depth && columns.end <= right.columns, "operands that meet");
    let panel = right.depth * TILE;
    let first = columns.start / TILE * panel + from / 2;
    let operands = ((left.lines.as_slice(), left.rows), (&right.lines[first..], panel, columns.len()));
    // SAFETY: as the caller says, and as was asserted.
    unsafe {
        match amx::available() {
            true => amx::multiply_tiles(operands.0, operands.1, left.depth, add, out, stride),
            false => bf16_dot::multiply_lines(operands.0, operands.1, left.depth, add, out, stride),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::packed::testing::{nearest, values};

    #[test]
    fn products_are_those_of_rounded_operands_in_parts_and_added() {
        if !available() {
            return;
        }
        for (m, k, n, d) in [(1, 3, 5, 2), (16, 64, 32, 32), (37, 130, 97, 21), (64, 96, 200, 64)] {
            let (a, b, c) = (values(m * d, 1), values(n * d, 2), values(n * k, 3));
            // [m, d] [d, n], of which the columns from `start` on are multiplied with their rows of [n, k].
            let start = n / 2 / DEPTH * DEPTH;
            let width = n - start;
            let (mut left, mut right) = (Left::default(), Right::default());
            left.take(m, d, |i| &a[i * d..(i + 1) * d]);
            right.take_columns(n, d, |i| &b[i * d..(i + 1) * d]);
            let mut scores = vec![f32::NAN; m * width];
            // SAFETY: rows and columns are those of `scores`.
            unsafe { multiply(&left, &right, 0, start..n, false, scores.as_mut_ptr(), width) };
            let check = |found: f32, terms: &mut dyn Iterator<Item = f64>, what: &str| {
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()));
                assert!(
                    (f64::from(found) - sum).abs() <= 1e-6 * size + 1e-30,
                    "{what} {m} {k} {n} {d}: {found}, {sum}"
                );
            };
            let of = |x: f32| f64::from(nearest(x));
            for i in 0..m {
                for j in 0..width {
                    let terms = &mut (0..d).map(|l| of(a[i * d + l]) * of(b[(start + j) * d + l]));
                    check(scores[i * width + j], terms, "scores");
                }
            }
            left.take(m, width, |i| &scores[i * width..(i + 1) * width]);
            right.take_rows(n, k, |i| &c[i * k..(i + 1) * k]);
            let mut out = vec![f32::NAN; m * (k + 3)];
            for add in [false, true] {
                // SAFETY: rows and columns are those of `out`.
                unsafe { multiply(&left, &right, start, 0..k, add, out.as_mut_ptr(), k + 3) };
            }
            for i in 0..m {
                for j in 0..k {
                    let terms = (0..width).map(|l| 2.0 * of(scores[i * width + l]) * of(c[(start + l) * k + j]));
                    check(out[i * (k + 3) + j], &mut terms.into_iter(), "sums");
                }
                assert!(out[i * (k + 3) + k..(i + 1) * (k + 3)].iter().all(|x| x.is_nan()), "only what was asked for");
            }
        }
    }
}
