//! bf16 weights in the order in which products of pairs read them.
//!
//! The matrix units of x86 and its dot products of bf16 both multiply pairs of neighbors in K and add them to f32. So
//! one order serves both: lines of 64 bytes, each a pair of K for 16 columns of N.

use rayon::prelude::*;

/// One cache line: a pair of K for 16 columns; one row of a tile.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Line(pub(super) [u16; 32]);

pub(super) const ZERO: Line = Line([0; 32]);

/// Columns of a line; rows of a tile.
pub(super) const TILE: usize = 16;
/// Depth of a tile of 16 lines: elements of K.
pub(super) const DEPTH: usize = 32;

/// The pairs of some lines, one after the other.
pub(super) fn pairs(lines: &[Line]) -> &[u32] {
    // SAFETY: a line is 16 pairs, aligned to 64, and any bits are numbers.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * TILE) }
}

/// A `[K, N]` operand of bf16 weights: `[N / 16][K / 2]` lines, K filled up with zeros to a multiple of 32.
#[derive(Clone, Debug)]
pub struct PackedWeights {
    pub(super) k: usize,
    pub(super) n: usize,
    lines: Vec<Line>,
}

impl PackedWeights {
    /// Packs the transpose of a row-major matrix: `rows[o]` holds the K weights of output o (N of them).
    pub fn transposed(rows: &[&[u8]], k: usize) -> Self {
        let n = rows.len();
        let depth = k.div_ceil(DEPTH);
        let mut lines = vec![ZERO; n.div_ceil(TILE) * depth * TILE];
        lines.par_chunks_mut((depth * TILE).max(1)).zip(rows.par_chunks(TILE)).for_each(|(lines, rows)| {
            for (column, row) in rows.iter().enumerate() {
                scatter_pairs(row, column, lines);
            }
        });
        Self { k, n, lines }
    }

    /// Packs a row-major matrix as it is: `rows[o]` holds row o of K, N weights each.
    pub fn straight(rows: &[&[u8]], n: usize) -> Self {
        let k = rows.len();
        let depth = k.div_ceil(DEPTH);
        let mut lines = vec![ZERO; n.div_ceil(TILE) * depth * TILE];
        lines.par_chunks_mut((depth * TILE).max(1)).enumerate().for_each(|(block, lines)| {
            let first = 2 * block * TILE;
            let bytes = first..2 * n.min((block + 1) * TILE);
            for (pair, line) in rows.chunks(2).zip(lines) {
                interleave(&pair[0][bytes.clone()], pair.get(1).map(|row| &row[bytes.clone()]), line);
            }
        });
        Self { k, n, lines }
    }

    /// The lines of 16 columns, from column `column` on.
    pub(super) fn panel(&self, column: usize) -> &[Line] {
        let lines = self.k.div_ceil(DEPTH) * TILE;
        &self.lines[column / TILE * lines..][..lines]
    }
}

/// Writes the pairs of one row into column `column` of consecutive lines.
fn scatter_pairs(row: &[u8], column: usize, lines: &mut [Line]) {
    let (pairs, last) = row.as_chunks::<4>();
    for (pair, line) in pairs.iter().zip(lines.iter_mut()) {
        line.0[2 * column] = u16::from_le_bytes([pair[0], pair[1]]);
        line.0[2 * column + 1] = u16::from_le_bytes([pair[2], pair[3]]);
    }
    if let [low, high] = last {
        lines[pairs.len()].0[2 * column] = u16::from_le_bytes([*low, *high]);
    }
}

/// Up to 16 elements of two rows, alternating.
fn interleave(even: &[u8], odd: Option<&[u8]>, line: &mut Line) {
    for (i, e) in even.as_chunks::<2>().0.iter().enumerate() {
        line.0[2 * i] = u16::from_le_bytes(*e);
    }
    for (i, o) in odd.unwrap_or_default().as_chunks::<2>().0.iter().enumerate() {
        line.0[2 * i + 1] = u16::from_le_bytes(*o);
    }
}

/// A result that tasks write blocks of.
pub(super) struct Target(pub *mut f32);

// SAFETY: tasks write disjoint blocks.
unsafe impl Sync for Target {}

/// What tests of products with packed weights share.
#[cfg(test)]
pub(super) mod testing {
    use super::PackedWeights;

    pub fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| {
                let x = (i ^ seed.wrapping_mul(0x9E37_79B9)).wrapping_mul(0x85EB_CA6B);
                ((x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35) >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    pub fn bf16(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
    }

    /// The nearest bf16, ties to even.
    pub fn nearest(x: f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000)
    }

    /// Compares products `multiply(x, m, w)` with sums in f64 in both orientations and at every edge; `seen` is what a
    /// product makes of an activation.
    pub fn check_products(multiply: impl Fn(&[f32], usize, &PackedWeights) -> Vec<f32>, seen: impl Fn(f32) -> f32) {
        for (m, k, n) in [
            (1, 1, 1),
            (16, 32, 16),
            (17, 33, 31),
            (40, 70, 300),
            (33, 64, 32),
            (128, 257, 65),
            (11, 48, 47),
            (2, 9, 700),
            (49, 1100, 40),
        ] {
            let x = values(m * k, 1);
            let matrix = bf16(&values(k * n, 2)); // [n, k] for transposed, [k, n] for straight
            let at = |i: usize| f32::from_bits(u32::from(u16::from_le_bytes([matrix[2 * i], matrix[2 * i + 1]])) << 16);
            let check = |packed: &PackedWeights, weight: &dyn Fn(usize, usize) -> f32| {
                let found = multiply(&x, m, packed);
                for t in 0..m {
                    for j in 0..n {
                        let terms = (0..k).map(|i| seen(x[t * k + i]) as f64 * weight(i, j) as f64);
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), v| (s + v, a + v.abs()));
                        let error = (found[t * n + j] as f64 - sum).abs();
                        assert!(error <= 1e-6 * size + 1e-30, "{m} {k} {n} at {t},{j}: {} for {sum}", found[t * n + j]);
                    }
                }
            };
            let rows: Vec<&[u8]> = matrix.chunks(2 * k).collect();
            check(&PackedWeights::transposed(&rows, k), &|i, j| at(j * k + i));
            let rows: Vec<&[u8]> = matrix.chunks(2 * n).collect();
            check(&PackedWeights::straight(&rows, n), &|i, j| at(i * n + j));
        }
    }

    /// A row of a product is the same whatever rows there are beside it.
    pub fn check_rows(multiply: impl Fn(&[f32], usize, &PackedWeights) -> Vec<f32>) {
        for (m, k, n) in [(50, 96, 48), (50, 1100, 40)] {
            let (x, matrix) = (values(m * k, 3), bf16(&values(k * n, 4)));
            let packed = PackedWeights::straight(&matrix.chunks(2 * n).collect::<Vec<_>>(), n);
            let all = multiply(&x, m, &packed);
            for t in [0, 17, 49] {
                assert_eq!(multiply(&x[t * k..(t + 1) * k], 1, &packed), all[t * n..(t + 1) * n]);
            }
        }
    }
}
