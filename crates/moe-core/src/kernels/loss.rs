//! Next-token cross-entropy over a vocabulary that arrives in blocks.

use burn::tensor::Tensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::math;
use crate::host;

/// Losses of some tokens and, in place of the logits, their gradients.
#[derive(Debug)]
pub struct Losses {
    /// Loss of each row; 0 for rows that do not count.
    pub losses: Vec<f64>,
    /// Gradient of the *sum* of the losses with respect to the logits, same blocks; empty unless asked for.
    pub d_logits: Vec<Tensor<2>>,
}

/// Cross-entropy `-log softmax(logits[t])[target]` of `blocks`, consecutive vocabulary blocks of the logits, `[n, V_b]`
/// each. `targets [n]` are token ids; rows without one count in neither loss nor gradient.
pub fn cross_entropy(blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Losses {
    let Some(first) = blocks.first() else { return Losses { losses: Vec::new(), d_logits: Vec::new() } };
    if host::is_host(&first.device()) {
        on_host(blocks, targets, gradient)
    } else {
        on_device(blocks, targets, gradient)
    }
}

struct Block {
    first: usize,
    width: usize,
    values: Vec<f32>,
}

fn on_host(blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Losses {
    let (n, device) = (targets.len(), blocks[0].device());
    let mut first = 0;
    let mut blocks: Vec<Block> = blocks
        .into_iter()
        .map(|tensor| {
            let width = tensor.dims()[1];
            first += width;
            Block { first: first - width, width, values: host::into_vec(tensor) }
        })
        .collect();
    // Three passes over the blocks: maximum, exponentials and their sum, normalization.
    let mut max = vec![f32::NEG_INFINITY; n];
    let mut target_logit = vec![0.0f32; n];
    for block in &blocks {
        max.par_iter_mut().zip(&mut target_logit).zip(targets).zip(block.values.par_chunks(block.width)).for_each(
            |(((max, logit), target), row)| {
                if let Some(target) = target {
                    *max = max.max(row_max(row));
                    if let Some(value) = (*target as usize).checked_sub(block.first).and_then(|i| row.get(i)) {
                        *logit = *value;
                    }
                }
            },
        );
    }
    let mut sum = vec![0.0f64; n];
    for block in &mut blocks {
        sum.par_iter_mut().zip(&max).zip(targets).zip(block.values.par_chunks_mut(block.width)).for_each(
            |(((sum, max), target), row)| {
                if target.is_some() {
                    *sum += row_exp(row, *max);
                }
            },
        );
    }
    let losses = (0..n)
        .map(|t| if targets[t].is_some() { sum[t].ln() + f64::from(max[t]) - f64::from(target_logit[t]) } else { 0.0 })
        .collect();
    let d_logits = if gradient {
        blocks
            .into_iter()
            .map(|mut block| {
                let (first, width) = (block.first, block.width);
                block.values.par_chunks_mut(width).zip(&sum).zip(targets).for_each(
                    |((row, sum), target)| match target {
                        Some(target) => {
                            let inverse = (1.0 / sum) as f32;
                            row.iter_mut().for_each(|x| *x *= inverse);
                            if let Some(x) = (*target as usize).checked_sub(first).and_then(|i| row.get_mut(i)) {
                                *x -= 1.0;
                            }
                        }
                        None => row.fill(0.0),
                    },
                );
                host::from_vec(block.values, [n, width], &device)
            })
            .collect()
    } else {
        Vec::new()
    };
    Losses { losses, d_logits }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn row_max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, tail) = row.as_chunks::<16>();
    for chunk in chunks {
        for i in 0..16 {
            // a NaN must win, so that a broken model is noticed: comparisons with NaN are false
            lanes[i] = if chunk[i] <= lanes[i] { lanes[i] } else { chunk[i] };
        }
    }
    lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, |a, b| if b <= a { a } else { b })
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn row_exp(row: &mut [f32], max: f32) -> f64 {
    let mut total = 0.0f64;
    for piece in row.chunks_mut(1024) {
        let mut sums = [0.0f32; 16];
        let (chunks, tail) = piece.as_chunks_mut::<16>();
        for chunk in chunks {
            for i in 0..16 {
                chunk[i] = math::exp(chunk[i] - max);
                sums[i] += chunk[i];
            }
        }
        let mut sum: f32 = sums.iter().sum();
        for x in tail {
            *x = math::exp(*x - max);
            sum += *x;
        }
        total += f64::from(sum);
    }
    total
}

fn on_device(blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Losses {
    let (n, device) = (targets.len(), blocks[0].device());
    let keep: Vec<f32> = targets.iter().map(|t| if t.is_some() { 1.0 } else { 0.0 }).collect();
    let keep = host::from_vec(keep, [n, 1], &device);
    let max = Tensor::cat(blocks.iter().map(|b| b.clone().max_dim(1)).collect(), 1).max_dim(1); // [n, 1]
    let mut sum = Tensor::<2>::zeros([n, 1], &device);
    let mut logit = Tensor::<2>::zeros([n, 1], &device);
    let mut first = 0;
    let mut hot = Vec::with_capacity(blocks.len());
    for block in &blocks {
        let width = block.dims()[1];
        sum = sum + (block.clone() - max.clone()).exp().sum_dim(1);
        let mut one = vec![0.0; n * width];
        for (t, target) in targets.iter().enumerate() {
            if let Some(i) = target.and_then(|id| (id as usize).checked_sub(first)).filter(|i| *i < width) {
                one[t * width + i] = 1.0;
            }
        }
        let one = host::from_vec(one, [n, width], &device);
        logit = logit + (block.clone() * one.clone()).sum_dim(1);
        hot.push(one);
        first += width;
    }
    let losses = host::into_vec(((sum.clone().log() + max.clone() - logit) * keep.clone()).reshape([n]))
        .into_iter()
        .map(f64::from)
        .collect();
    let d_logits = if gradient {
        blocks
            .into_iter()
            .zip(hot)
            .map(|(block, one)| ((block - max.clone()).exp() / sum.clone() - one) * keep.clone())
            .collect()
    } else {
        Vec::new()
    };
    Losses { losses, d_logits }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    #[test]
    fn blocks_agree_with_the_plain_formula_on_both_bodies() {
        let targets = [Some(3), None, Some(40), Some(0)];
        let (a, b) = (pattern([4, 30], 1), pattern([4, 11], 2));
        let host_result = on_host(vec![a.clone(), b.clone()], &targets, true);
        let device_result = on_device(vec![a.clone(), b.clone()], &targets, true);
        let logits = host::into_vec(Tensor::cat(vec![a, b], 1));
        for (t, target) in targets.iter().enumerate() {
            let row = &logits[t * 41..(t + 1) * 41];
            let sum: f64 = row.iter().map(|x| (*x as f64).exp()).sum();
            let expected = target.map_or(0.0, |i| sum.ln() - row[i as usize] as f64);
            assert!((host_result.losses[t] - expected).abs() < 1e-6);
            assert!((device_result.losses[t] - expected).abs() < 1e-5);
        }
        for (x, y) in host_result.d_logits.iter().zip(&device_result.d_logits) {
            assert_close(x, y, 1e-6);
        }
    }

    #[test]
    fn a_nan_logit_gives_a_nan_loss() {
        let device = crate::kernels::testing::device();
        let mut values = vec![0.0; 40];
        values[17] = f32::NAN;
        let result = cross_entropy(vec![host::from_vec(values, [1, 40], &device)], &[Some(2)], false);
        assert!(result.losses[0].is_nan());
    }
}
