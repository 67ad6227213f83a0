//! What recurrences over tokens that are computed chunk by chunk have in common: rows of one head side by side, decays
//! within a chunk, and the heads of all sequences in parallel.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    math,
    small_products::{add_scaled, product_nt},
};

/// Tokens that are computed together.
pub const CHUNK: usize = 64;

/// Where each chunk of so many tokens begins and ends.
pub(super) fn chunks(tokens: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    (0..tokens.div_ceil(CHUNK)).map(move |i| i * CHUNK..((i + 1) * CHUNK).min(tokens))
}

/// Rows of one head, of a width, side by side.
pub(super) fn gather(x: &[f32], rows: &Range<usize>, heads: usize, head: usize, width: usize) -> Vec<f32> {
    rows.clone().flat_map(|t| x[(t * heads + head) * width..][..width].iter().copied()).collect()
}

/// Adds rows of one head to those of all heads.
pub(super) fn scatter(values: &[f32], rows: &Range<usize>, heads: usize, head: usize, width: usize, out: &mut [f32]) {
    for (t, values) in rows.clone().zip(values.chunks_exact(width)) {
        add_scaled(values, 1.0, &mut out[(t * heads + head) * width..][..width]);
    }
}

/// Output `[T, heads * width]` of independent sequences, disjoint row ranges, from what `run` makes of the rows of each
/// and a head, given the head's state, which it moves on. `states` has one vector per sequence, head after head.
pub(super) fn run_heads(
    sequences: &[Range<usize>],
    [heads, width]: [usize; 2],
    states: &mut [Vec<f32>],
    mut out: Vec<f32>,
    run: impl Fn(&Range<usize>, usize, &mut [f32]) -> Vec<f32> + Sync,
) -> Vec<f32> {
    let tasks: Vec<(usize, usize, &mut [f32])> = states
        .iter_mut()
        .enumerate()
        .flat_map(|(s, state)| {
            let per_head = (state.len() / heads).max(1);
            state.chunks_exact_mut(per_head).enumerate().map(move |(head, state)| (s, head, state))
        })
        .collect();
    let outputs: Vec<(usize, usize, Vec<f32>)> =
        tasks.into_par_iter().map(|(s, head, state)| (s, head, run(&sequences[s], head, state))).collect();
    for (s, head, values) in outputs {
        scatter(&values, &sequences[s], heads, head, width, &mut out);
    }
    out
}

/// What `run` makes of the rows of every sequence and every head, given to `add` sequence by sequence, head by head. A
/// few are computed at a time, so that memory does not grow with their number.
pub(super) fn each_head<R: Send>(
    sequences: &[Range<usize>],
    heads: usize,
    run: impl Fn(&Range<usize>, usize) -> R + Sync,
    mut add: impl FnMut(&Range<usize>, usize, R),
) {
    let tasks: Vec<(usize, usize)> = (0..sequences.len()).flat_map(|s| (0..heads).map(move |head| (s, head))).collect();
    for tasks in tasks.chunks(2 * rayon::current_num_threads().max(1)) {
        let found: Vec<R> = tasks.par_iter().map(|&(s, head)| run(&sequences[s], head)).collect();
        for (&(s, head), found) in tasks.iter().zip(found) {
            add(&sequences[s], head, found);
        }
    }
}

/// Decays of the tokens of a chunk, one number each: the sums `G` of their logarithms from the first token on.
pub(super) struct Decays(Vec<f32>);

impl Decays {
    /// From the logarithm of the decay of every token, at most 0.
    pub fn new(logarithms: impl Iterator<Item = f32>) -> Self {
        let mut sum = 0.0f32;
        let sums = logarithms.map(|logarithm| {
            sum += logarithm;
            sum
        });
        Self(sums.collect())
    }

    /// Tokens of the chunk.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// `e^{G_i - G_j}`.
    pub fn between(&self, i: usize, j: usize) -> f32 {
        math::exp(self.0[i] - self.0[j])
    }

    /// `e^{G_i}`.
    pub fn since_start(&self, i: usize) -> f32 {
        math::exp(self.0[i])
    }

    /// Rows of a width times `e^{G_last - G}`.
    pub fn to_the_end(&self, x: &[f32], width: usize) -> Vec<f32> {
        let last = self.len() - 1;
        let rows = x.chunks_exact(width).enumerate();
        rows.flat_map(|(j, row)| {
            let fade = self.between(last, j);
            row.iter().map(move |x| x * fade)
        })
        .collect()
    }

    /// `e^{G_i - G_j} a_i . b_j` for `j <= i`, and 0 above the diagonal, of rows of a width.
    pub fn products(&self, a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
        let n = self.len();
        let mut products = vec![0.0; n * n];
        product_nt(a, b, width, &mut products);
        for (i, row) in products.chunks_exact_mut(n).enumerate() {
            row[..=i].iter_mut().enumerate().for_each(|(j, product)| *product *= self.between(i, j));
            row[i + 1..].fill(0.0);
        }
        products
    }
}

/// From gradients at the sums `G` to those at the logarithms of the tokens: token i is in all sums from i on. Rows of a
/// width.
pub(super) fn of_each_token(d_sums: &mut [f32], width: usize) {
    for end in (width..d_sums.len()).step_by(width).rev() {
        let (before, after) = d_sums.split_at_mut(end);
        add_scaled(&after[..width], 1.0, &mut before[end - width..]);
    }
}

#[cfg(test)]
pub(super) mod testing {
    /// Numbers between -1 and 1 without a pattern.
    pub fn values(count: usize, seed: u32) -> Vec<f32> {
        let next = |i: usize| {
            let mut x = (i as u32).wrapping_mul(0x9E37_79B9) ^ seed.wrapping_mul(0x85EB_CA6B);
            x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
            ((x ^ (x >> 12)) >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// Checks gradients of `sum(d_out * run(inputs))` against difference quotients, at some places of every input.
    pub fn check_gradients<const N: usize>(
        inputs: &[Vec<f32>; N],
        found: [&[f32]; N],
        d_out: &[f32],
        run: impl Fn(&[Vec<f32>; N]) -> Vec<f32>,
    ) {
        for (part, found) in found.into_iter().enumerate() {
            for i in (0..found.len()).step_by((found.len() / 37).max(1)) {
                let at = |h: f32| -> f64 {
                    let mut moved = inputs.clone();
                    moved[part][i] += h;
                    run(&moved).iter().zip(d_out).map(|(o, d)| f64::from(*o) * f64::from(*d)).sum()
                };
                let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                let close = (numeric - f64::from(found[i])).abs() < 3e-3 * (1.0 + numeric.abs());
                assert!(close, "part {part}, {i}: {} and {numeric}", found[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_go_back_to_tokens() {
        let mut d = vec![1.0, 10.0, 2.0, 20.0, 4.0, 40.0];
        of_each_token(&mut d, 2);
        assert_eq!(d, [7.0, 70.0, 6.0, 60.0, 4.0, 40.0]);
        let mut one = vec![1.0, 2.0, 4.0];
        of_each_token(&mut one, 1);
        assert_eq!(one, [7.0, 6.0, 4.0]);
    }

    #[test]
    fn decays_are_products_of_those_between() {
        let decays = Decays::new([-0.5f32, -0.25, -1.0].into_iter());
        assert!((decays.between(2, 0) - (-1.25f32).exp()).abs() < 1e-6);
        assert!((decays.since_start(1) - (-0.75f32).exp()).abs() < 1e-6);
        let products = decays.products(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0], 1);
        assert_eq!([products[1], products[2], products[5]], [0.0; 3]);
        assert!((products[6] - 12.0 * (-1.25f32).exp()).abs() < 1e-5);
        assert!((decays.to_the_end(&[1.0, 1.0, 1.0], 1)[1] - (-1.0f32).exp()).abs() < 1e-6);
    }

    #[test]
    fn every_token_is_in_one_chunk() {
        assert_eq!(chunks(2 * CHUNK + 1).collect::<Vec<_>>(), [0..CHUNK, CHUNK..2 * CHUNK, 2 * CHUNK..2 * CHUNK + 1]);
        assert_eq!(chunks(0).count(), 0);
    }
}
