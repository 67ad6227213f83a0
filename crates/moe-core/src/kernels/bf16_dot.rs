//! Products of activations that are rounded to bf16 with bf16 weights, summed in f32: AVX-512's dot products of pairs
//! (`vdpbf16ps`).
//!
//! A block of up to 12 rows and 32 columns is in registers over all of K; each step loads two lines of weights and
//! spreads a pair of each row. Each element is one sum in one order, so that a row is the same whatever rows there are
//! beside it.

use std::{
    arch::x86_64::{
        __m512bh, __m512i, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_load_si512,
        _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_store_si512, _mm512_storeu_ps,
    },
    cell::RefCell,
    sync::OnceLock,
};

use rayon::prelude::*;

use super::packed::{DEPTH, Line, PackedWeights, TILE, Target, ZERO, pairs};

/// Whether the processor has these products; `MOE_BF16=0` in the environment turns them off.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        std::env::var_os("MOE_BF16").is_none_or(|v| v != "0")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
    })
}

/// Rows of a block.
const ROWS: usize = 12;
/// Columns of a block.
const COLUMNS: usize = 2 * TILE;
/// Output columns of one task.
const TASK_COLUMNS: usize = 128;
/// Bytes of packed activations that a task goes through for every 32 columns: half of a second-level cache.
const ACTIVATION_BYTES: usize = 1 << 19;
/// Multiply-adds from which on a product is shared between threads.
const SHARED: usize = 1 << 20;

thread_local! {
    /// Rounded activations of the calls of one thread: as large as its largest call, kept for the next.
    static ACTIVATIONS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// `bf16(x) w` for `x [m, k]` row-major and `w [k, n]`: `[m, n]` row-major.
pub fn multiply(x: &[f32], m: usize, w: &PackedWeights) -> Vec<f32> {
    assert_eq!(x.len(), m * w.k, "activations [m, k]");
    assert!(available(), "the processor has these products");
    if m == 0 || w.n == 0 || w.k == 0 {
        return vec![0.0; m * w.n];
    }
    // Taken out while in use: a nested call on this thread (rayon may steal one) finds an empty buffer, not a borrowed
    // one.
    let mut buffer = ACTIVATIONS.take();
    let depth = w.k.div_ceil(DEPTH);
    if buffer.len() < m * depth {
        buffer.resize(m * depth, ZERO);
    }
    let rounded = &mut buffer[..m * depth];
    let many = m * w.k * w.n >= SHARED;
    let round = |(lines, x): (&mut [Line], &[f32])| round_row(x, lines, 1);
    match many && m > 64 {
        true => rounded.par_chunks_exact_mut(depth).zip(x.par_chunks_exact(w.k)).with_min_len(32).for_each(round),
        false => rounded.chunks_exact_mut(depth).zip(x.chunks_exact(w.k)).for_each(round),
    }
    let out = multiply_rounded(pairs(rounded), m, w, many);
    ACTIVATIONS.set(buffer);
    out
}

/// Rounds a row to the nearest bf16, ties to even, into lines that are `step` apart, of which the last is filled up
/// with zeros.
pub(super) fn round_row(x: &[f32], lines: &mut [Line], step: usize) {
    assert!(available() && x.len().div_ceil(DEPTH) <= lines.len().div_ceil(step), "a line for every 32 numbers");
    // SAFETY: the processor has these instructions, as asserted.
    unsafe { round_to_lines(x, lines, step) }
}

#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn round_to_lines(x: &[f32], lines: &mut [Line], step: usize) {
    let (blocks, tail) = x.as_chunks::<DEPTH>();
    let mut padded = [0.0f32; DEPTH];
    padded[..tail.len()].copy_from_slice(tail);
    let last = (!tail.is_empty()).then_some(&padded);
    for (block, line) in blocks.iter().chain(last).zip(lines.iter_mut().step_by(step)) {
        // SAFETY: 32 values are read, and a line is 32 of two bytes, aligned to 64.
        unsafe {
            let [low, high] = [0, TILE].map(|from| _mm512_loadu_ps(block.as_ptr().add(from)));
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_store_si512(std::ptr::from_mut(line).cast(), rounded);
        }
    }
}

fn multiply_rounded(activations: &[u32], m: usize, w: &PackedWeights, many: bool) -> Vec<f32> {
    let (n, pairs) = (w.n, w.k.div_ceil(DEPTH) * TILE);
    let task_rows = (ACTIVATION_BYTES / (4 * pairs)).max(ROWS) / ROWS * ROWS;
    let tasks: Vec<(usize, usize)> = (0..m)
        .step_by(task_rows)
        .flat_map(|row| (0..n).step_by(TASK_COLUMNS).map(move |column| (row, column)))
        .collect();
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    let target = Target(out.as_mut_ptr());
    let task = |&(first_row, first_column): &(usize, usize)| {
        let target = &target;
        let mut scratch = [0.0f32; ROWS * COLUMNS];
        for column in (first_column..n.min(first_column + TASK_COLUMNS)).step_by(COLUMNS) {
            let columns = (n - column).min(COLUMNS);
            let left = w.panel(column);
            // a missing second half repeats the first; its result is not copied out
            let right = if columns > TILE { w.panel(column + TILE) } else { left };
            for row in (first_row..m.min(first_row + task_rows)).step_by(ROWS) {
                let rows = (m - row).min(ROWS);
                let a = &activations[row * pairs..(row + rows) * pairs];
                // SAFETY: the processor has these products; `a` holds `rows` rows of `pairs`, panels at least as many
                // lines; `out` has room for m x n, and the block at (row, column) belongs to this task alone. One that
                // reaches past the edge goes through the scratch.
                unsafe {
                    let out = target.0.add(row * n + column);
                    if columns == COLUMNS {
                        some_rows(rows, a, left, right, pairs, out, n);
                    } else {
                        some_rows(rows, a, left, right, pairs, scratch.as_mut_ptr(), COLUMNS);
                        for r in 0..rows {
                            std::ptr::copy_nonoverlapping(scratch.as_ptr().add(r * COLUMNS), out.add(r * n), columns);
                        }
                    }
                }
            }
        }
    };
    match many && tasks.len() > 1 {
        true => tasks.par_iter().for_each(task),
        false => tasks.iter().for_each(task),
    }
    // SAFETY: the tasks cover all rows and columns, so every element has been written.
    unsafe { out.set_len(m * n) };
    out
}

/// # Safety
/// Those of [`block`], with `rows` rows, at most 12.
unsafe fn some_rows(rows: usize, a: &[u32], left: &[Line], right: &[Line], pairs: usize, out: *mut f32, width: usize) {
    let block = match rows {
        1 => block::<1>,
        2 => block::<2>,
        3 => block::<3>,
        4 => block::<4>,
        5 => block::<5>,
        6 => block::<6>,
        7 => block::<7>,
        8 => block::<8>,
        9 => block::<9>,
        10 => block::<10>,
        11 => block::<11>,
        _ => block::<ROWS>,
    };
    // SAFETY: as the caller says.
    unsafe { block(a, left, right, pairs, out, width) }
}

/// `R` rows of 32 columns of the product.
///
/// # Safety
/// The processor has the instructions; `a` holds `R` rows of `pairs` pairs, `left` and `right` at least `pairs` lines,
/// `out` `R` rows of 32 elements `width` apart.
#[target_feature(enable = "avx512bf16,avx512f")]
unsafe fn block<const R: usize>(a: &[u32], left: &[Line], right: &[Line], pairs: usize, out: *mut f32, width: usize) {
    let (a, left, right) = (a.as_ptr(), left.as_ptr(), right.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: as the caller says; lines are aligned to 64 bytes, and the casts are between registers of 512 bits.
    unsafe {
        for pair in 0..pairs {
            let line = |panel: *const Line| -> __m512bh {
                std::mem::transmute(_mm512_castsi512_ps(_mm512_load_si512(panel.add(pair).cast())))
            };
            let (left, right) = (line(left), line(right));
            for (row, sums) in sums.iter_mut().enumerate() {
                let spread = _mm512_set1_epi32(*a.add(row * pairs + pair) as i32);
                let spread: __m512bh = std::mem::transmute(_mm512_castsi512_ps(spread));
                sums[0] = _mm512_dpbf16_ps(sums[0], spread, left);
                sums[1] = _mm512_dpbf16_ps(sums[1], spread, right);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(out.add(row * width), sums[0]);
            _mm512_storeu_ps(out.add(row * width + TILE), sums[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::packed::testing::{check_products, check_rows, nearest, values};

    #[test]
    fn products_of_rounded_activations_are_summed_in_f32_in_both_orientations_and_at_every_edge() {
        if available() {
            check_products(multiply, nearest);
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        if available() {
            check_rows(multiply);
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_with_ties_to_even_and_keeps_what_is_no_number() {
        if !available() {
            return;
        }
        let ties = [0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F7F_FFFF].map(f32::from_bits);
        for x in values(1000, 7).into_iter().chain(ties).chain([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY]) {
            let mut tile = [ZERO; 16];
            round_row(&[1.0, x], &mut tile[3..], 16);
            assert_eq!(u32::from(tile[3].0[1]) << 16, nearest(x).to_bits(), "{x}");
        }
        let mut tile = [ZERO; 16];
        round_row(&[f32::from_bits(0x7FFF_FFFF)], &mut tile, 16);
        assert!(f32::from_bits(u32::from(tile[0].0[0]) << 16).is_nan());
    }
}
