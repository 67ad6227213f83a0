//! Divergence of next-token distributions from a teacher's, over a vocabulary that arrives in blocks.
//!
//! The values come to the host on every device: what is selected per row differs from row to row.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::loss::{Losses, row_exp, row_max};
use crate::host::{self, HostView};

/// A teacher's distribution at one position.
#[derive(Clone, Copy, Debug)]
pub struct Distribution<'a> {
    /// Tokens of `log_probs`; all in order if not given.
    pub ids: Option<&'a [u32]>,
    /// Log-probabilities of the tokens.
    pub log_probs: &'a [f32],
    /// Log-probability of all other tokens together; minus infinity if there are none.
    pub rest: f32,
}

/// The most likely tokens of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Largest {
    /// Most likely first, the lower id on a tie; empty if all tokens are kept, in order.
    pub ids: Vec<u32>,
    /// Log-probability of each.
    pub log_probs: Vec<f32>,
    /// That of all others together; minus infinity if there are none.
    pub rest: f32,
}

/// The `top` most likely tokens of the rows of `blocks` (logits, `[n, V_b]` each) that are `wanted [n]`.
pub fn largest(blocks: &[Tensor<2>], wanted: &[bool], top: usize) -> Vec<Largest> {
    let views: Vec<(HostView, usize)> = blocks.iter().map(|b| (HostView::new(b), b.dims()[1])).collect();
    let rows: Vec<usize> = (0..wanted.len()).filter(|&t| wanted[t]).collect();
    rows.into_par_iter()
        .map(|t| {
            let logits: Vec<f32> =
                views.iter().flat_map(|(view, width)| &view.as_slice()[t * width..(t + 1) * width]).copied().collect();
            largest_of_row(logits, top)
        })
        .collect()
}

fn largest_of_row(mut logits: Vec<f32>, top: usize) -> Largest {
    let max = row_max(&logits);
    if top >= logits.len() {
        let log_sum = row_exp(&mut logits.clone(), max).ln() + f64::from(max);
        let log_probs = logits.iter().map(|z| (f64::from(*z) - log_sum) as f32).collect();
        return Largest { ids: Vec::new(), log_probs, rest: f32::NEG_INFINITY };
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    ids.select_nth_unstable_by(top, order);
    ids.truncate(top);
    ids.sort_unstable_by(order);
    let kept: Vec<f32> = ids.iter().map(|&id| std::mem::replace(&mut logits[id as usize], f32::NEG_INFINITY)).collect();
    let (kept_sum, rest_sum) = sums(&kept, &mut logits, max);
    let log_sum = (kept_sum + rest_sum).ln() + f64::from(max);
    Largest {
        ids,
        log_probs: kept.iter().map(|z| (f64::from(*z) - log_sum) as f32).collect(),
        rest: (rest_sum.ln() + f64::from(max) - log_sum) as f32,
    }
}

/// Sums of `e^(z - max)` over kept logits and over the others, which it replaces by their exponentials. Apart, so that
/// a small rest is exact.
fn sums(kept: &[f32], others: &mut [f32], max: f32) -> (f64, f64) {
    (row_exp(&mut kept.to_vec(), max), row_exp(others, max))
}

/// `KL(teacher || softmax(logits))` per row, in nats, and the gradient of the sum; rows without a teacher have neither.
/// Tokens that a teacher does not list count as one, `q_rest = sum of their q`:
///
/// `KL = sum_v p_v ln(p_v / q_v) + p_rest ln(p_rest / q_rest)`, with gradient `q_v - p_v` for listed tokens and
/// `q_v (1 - p_rest / q_rest)` for the others.
pub fn divergence(blocks: Vec<Tensor<2>>, teachers: &[Option<Distribution<'_>>], gradient: bool) -> Losses {
    let Some(device) = blocks.first().map(Tensor::device) else {
        return Losses { losses: Vec::new(), d_logits: Vec::new() };
    };
    let n = teachers.len();
    let widths: Vec<usize> = blocks.iter().map(|block| block.dims()[1]).collect();
    let mut values: Vec<Vec<f32>> = blocks.into_iter().map(host::into_vec).collect();
    let mut rows: Vec<Vec<&mut [f32]>> = (0..n).map(|_| Vec::with_capacity(widths.len())).collect();
    for (block, &width) in values.iter_mut().zip(&widths) {
        block.chunks_exact_mut(width).zip(&mut rows).for_each(|(piece, row)| row.push(piece));
    }
    let losses = rows
        .into_par_iter()
        .zip(teachers)
        .map(|(mut pieces, teacher)| match teacher {
            Some(teacher) => row_divergence(&mut pieces, teacher, gradient),
            None => {
                pieces.into_iter().for_each(|piece| piece.fill(0.0));
                0.0
            }
        })
        .collect();
    let d_logits = if gradient {
        let blocks = values.into_iter().zip(widths);
        blocks.map(|(values, width)| host::from_vec(values, [n, width], &device)).collect()
    } else {
        Vec::new()
    };
    Losses { losses, d_logits }
}

fn row_divergence(pieces: &mut [&mut [f32]], teacher: &Distribution<'_>, gradient: bool) -> f64 {
    let starts: Vec<usize> = pieces
        .iter()
        .scan(0, |end, piece| {
            *end += piece.len();
            Some(*end - piece.len())
        })
        .collect();
    let place = |i: usize| {
        let id = teacher.ids.map_or(i, |ids| ids[i] as usize);
        let piece = starts.partition_point(|start| *start <= id) - 1;
        (piece, id - starts[piece])
    };
    let max = pieces.iter().map(|piece| row_max(piece)).fold(f32::NEG_INFINITY, |a, b| if b <= a { a } else { b });
    let listed: Vec<f32> = (0..teacher.log_probs.len())
        .map(|i| {
            let (piece, at) = place(i);
            std::mem::replace(&mut pieces[piece][at], f32::NEG_INFINITY)
        })
        .collect();
    let (mut listed_sum, mut rest_sum) = (0.0, 0.0);
    for (i, piece) in pieces.iter_mut().enumerate() {
        let (listed, rest) = sums(if i == 0 { &listed } else { &[] }, piece, max);
        (listed_sum, rest_sum) = (listed_sum + listed, rest_sum + rest);
    }
    let sum = listed_sum + rest_sum;
    let log_sum = sum.ln() + f64::from(max);
    let mut loss = 0.0;
    for (z, log_p) in listed.iter().zip(teacher.log_probs) {
        let log_p = f64::from(*log_p);
        loss += log_p.exp() * (log_p - (f64::from(*z) - log_sum));
    }
    let p_rest = f64::from(teacher.rest).exp();
    if p_rest > 0.0 {
        loss += p_rest * (f64::from(teacher.rest) - (rest_sum.ln() + f64::from(max) - log_sum));
    }
    if gradient {
        let factor = ((1.0 - p_rest * sum / rest_sum) / sum) as f32;
        // what is left of listed tokens is overwritten below
        pieces.iter_mut().for_each(|piece| piece.iter_mut().for_each(|q| *q *= factor));
        for (i, (z, log_p)) in listed.iter().zip(teacher.log_probs).enumerate() {
            let (piece, at) = place(i);
            pieces[piece][at] = ((f64::from(*z) - log_sum).exp() - f64::from(*log_p).exp()) as f32;
        }
    }
    loss
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{device, pattern};

    fn blocks(seed: u32) -> Vec<Tensor<2>> {
        vec![pattern([3, 20], seed).mul_scalar(3.0), pattern([3, 9], seed + 1).mul_scalar(3.0)]
    }

    fn teacher(kept: &[Largest]) -> Vec<Option<Distribution<'_>>> {
        kept.iter()
            .map(|l| {
                let ids = (!l.ids.is_empty()).then_some(l.ids.as_slice());
                Some(Distribution { ids, log_probs: &l.log_probs, rest: l.rest })
            })
            .collect()
    }

    fn probabilities(row: &[f32]) -> Vec<f64> {
        let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
        row.iter().map(|z| f64::from(*z).exp() / sum).collect()
    }

    #[test]
    fn the_most_likely_tokens_and_the_rest_sum_to_one() {
        let logits = host::into_vec(Tensor::cat(blocks(1), 1));
        for top in [1, 5, 28, 29, 40] {
            let kept = largest(&blocks(1), &[true, false, true], top);
            assert_eq!(kept.len(), 2);
            let p = probabilities(&logits[58..]);
            let row = &kept[1];
            assert_eq!(row.ids.len(), if top < 29 { top } else { 0 });
            let sum: f64 = row.log_probs.iter().map(|l| f64::from(*l).exp()).sum::<f64>() + f64::from(row.rest).exp();
            assert!((sum - 1.0).abs() < 1e-6, "{sum}");
            for (i, log_p) in row.log_probs.iter().enumerate() {
                let id = row.ids.get(i).map_or(i, |id| *id as usize);
                assert!((f64::from(*log_p) - p[id].ln()).abs() < 1e-5);
            }
        }
        let tied = largest(&[host::from_vec(vec![1.0, 2.0, 2.0, 2.0], [1, 4], &device())], &[true], 2);
        assert_eq!(tied[0].ids, [1, 2]);
    }

    #[test]
    fn divergence_is_the_plain_formula_and_its_gradient_a_difference_quotient() {
        let student = host::into_vec(Tensor::cat(blocks(7), 1));
        for top in [4, 29] {
            let kept = largest(&blocks(3), &[true; 3], top);
            let mut teachers = teacher(&kept);
            teachers[1] = None;
            let found = divergence(blocks(7), &teachers, true);
            let gradient = host::into_vec(Tensor::cat(found.d_logits, 1));
            let plain = |row: usize, logits: &[f32]| -> f64 {
                let (q, l) = (probabilities(logits), &kept[row]);
                let ids: Vec<usize> =
                    if top < 29 { l.ids.iter().map(|i| *i as usize).collect() } else { (0..29).collect() };
                let log_p: Vec<f64> = l.log_probs.iter().map(|x| f64::from(*x)).collect();
                let listed: f64 = ids.iter().zip(&log_p).map(|(&i, l)| l.exp() * (l - q[i].ln())).sum();
                let rest: f64 = (0..29).filter(|i| !ids.contains(i)).map(|i| q[i]).sum();
                let p_rest = f64::from(l.rest).exp();
                listed + if p_rest > 0.0 { p_rest * (p_rest / rest).ln() } else { 0.0 }
            };
            for row in [0, 2] {
                let logits = &student[row * 29..(row + 1) * 29];
                assert!((found.losses[row] - plain(row, logits)).abs() < 1e-6);
                for v in 0..29 {
                    let at = |h: f32| {
                        let mut moved = logits.to_vec();
                        moved[v] += h;
                        plain(row, &moved)
                    };
                    let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                    let analytic = f64::from(gradient[row * 29 + v]);
                    assert!((numeric - analytic).abs() < 1e-4, "{row} {v}: {numeric} {analytic}");
                }
            }
            assert_eq!(found.losses[1], 0.0);
            assert!(gradient[29..58].iter().all(|d| *d == 0.0));
        }
    }

    #[test]
    fn a_distribution_does_not_diverge_from_itself_and_fewer_tokens_see_less() {
        let divergences = |seed: u32, top: usize| {
            let kept = largest(&blocks(3), &[true; 3], top);
            divergence(blocks(seed), &teacher(&kept), false).losses
        };
        for top in [1, 4, 29] {
            assert!(divergences(3, top).iter().all(|d| d.abs() < 1e-6), "{:?}", divergences(3, top));
        }
        for (few, all) in divergences(7, 4).iter().zip(divergences(7, 29)) {
            assert!(*few > 0.0 && *few <= all + 1e-6, "{few} {all}");
        }
    }
}
