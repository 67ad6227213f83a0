//! Which experts a token uses, and how much of each.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Selection and combine weight. `z` are router logits, `p = softmax(z)`; ties go to the lower index.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Gate {
    /// The `k` most probable; `p`, divided by their sum.
    TopK {
        /// How many.
        k: usize,
    },
    /// The most probable until their sum reaches `top_p`; `p`, divided by their sum.
    TopP {
        /// The sum.
        top_p: f64,
    },
    /// The most probable, with a weight of 1 that gives the router no gradient (LLaVA-MoLE).
    Top1 {},
    /// All, with `p` (LoRAMoE).
    Dense {},
    /// The expert of the sequence's label, with a weight of 1 (first stage of LoRA-Mixer). Without labels none.
    Label {},
    /// All where `H > threshold`, the Tsallis entropy of `p + epsilon` over its maximum; else those most probable up to
    /// a sum of `top_p`, the one that crosses it not among them, and always the first `keep_top_k`. `p` as it is
    /// (DynMoLE).
    Uncertain {
        /// Of the entropy; 1 is Shannon's.
        q: f64,
        /// From which on all are used.
        threshold: f64,
        /// The sum.
        top_p: f64,
        /// Least number.
        keep_top_k: usize,
        /// Added to probabilities in the entropy.
        epsilon: f64,
    },
    /// `score = sigmoid(z) + d`, each for `partition` ranks; the `k` best, with `k score / sum of the chosen` (SMoRA).
    /// `d` moves after every wave of training by `bias_rate` towards equal use.
    Ranks {
        /// How many ranks.
        k: usize,
        /// Ranks to a logit.
        partition: usize,
        /// How fast `d` moves.
        bias_rate: f64,
    },
    /// `zhat = A x / ||A x||`; the `k` largest, signed, with their softmax at this temperature; outside of training
    /// those below `threshold` not (MoRAM).
    SelfActivated {
        /// How many ranks, at least 2.
        k: usize,
        /// Of the softmax.
        temperature: f64,
        /// Least `zhat` outside of training.
        threshold: f64,
    },
    /// The `k` largest of `A x + d` with a frozen sparse `A`, with a weight of 1 (FlyLoRA). `d` moves as in
    /// [`Gate::Ranks`].
    Sparse {
        /// How many ranks.
        k: usize,
        /// What is compared.
        score: Score,
        /// How fast `d` moves.
        bias_rate: f64,
    },
}

/// What [`Gate::Sparse`] compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// The value: equation 10 of the paper, and its fork of PEFT.
    #[default]
    Signed,
    /// The magnitude: the paper's prose, and the authors' single-file code.
    Magnitude,
}

/// What a gate needs besides logits.
pub(crate) struct Context<'a> {
    pub training: bool,
    /// `d` of gates by rank.
    pub bias: &'a [f32],
    /// The expert of each row's label.
    pub labels: &'a dyn Fn(usize) -> Option<usize>,
}

/// Gates of some tokens.
pub(crate) struct Gated {
    /// Weights `[n, width]`, 0 for what is not chosen.
    pub weights: Vec<f32>,
    /// Probabilities `[n, N]` of gates by expert.
    pub p: Vec<f32>,
    /// Whether it is chosen `[n, width]`.
    pub chosen: Vec<bool>,
}

impl Gate {
    /// Whether every rank is an expert.
    pub fn is_by_rank(&self) -> bool {
        matches!(self, Self::Ranks { .. } | Self::SelfActivated { .. } | Self::Sparse { .. })
    }

    /// Whether a linear router makes the logits; else they are `A x`.
    pub fn has_router(&self) -> bool {
        !matches!(self, Self::SelfActivated { .. } | Self::Sparse { .. } | Self::Label {})
    }

    /// How fast biases of the selection move.
    pub(crate) fn bias_rate(&self) -> Option<f32> {
        match self {
            Self::Ranks { bias_rate, .. } | Self::Sparse { bias_rate, .. } => Some(*bias_rate as f32),
            _ => None,
        }
    }

    pub(crate) fn validate(&self, r: usize) -> Result<()> {
        let whole = |field: &str, found: usize, range: std::ops::RangeInclusive<usize>| match range.contains(&found) {
            true => Ok(()),
            false => Err(Error::input(format!("gate.{field}"), found, format!("{} to {}", range.start(), range.end()))),
        };
        let number = |field: &str, found: f64, ok: bool, expected: &str| match ok {
            true => Ok(()),
            false => Err(Error::input(format!("gate.{field}"), found, expected)),
        };
        match *self {
            Self::TopK { k } => whole("k", k, 1..=usize::MAX),
            Self::TopP { top_p } => number("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "a number in (0, 1]"),
            Self::Uncertain { q, threshold, top_p, keep_top_k, epsilon } => {
                number("q", q, q > 0.0 && q.is_finite(), "a finite number above 0")?;
                number("threshold", threshold, threshold.is_finite(), "a finite number")?;
                number("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "a number in (0, 1]")?;
                number("epsilon", epsilon, (0.0..0.1).contains(&epsilon), "a number in [0, 0.1)")?;
                whole("keep_top_k", keep_top_k, 1..=usize::MAX)
            }
            Self::Ranks { k, partition, bias_rate } => {
                whole("k", k, 1..=r)?;
                whole("partition", partition, 1..=r)?;
                number("partition", partition as f64, r.is_multiple_of(partition), "a divisor of `r`")?;
                number(
                    "bias_rate",
                    bias_rate,
                    bias_rate >= 0.0 && bias_rate.is_finite(),
                    "a finite number of 0 or more",
                )
            }
            Self::SelfActivated { k, temperature, threshold } => {
                whole("k", k, 2..=usize::MAX)?;
                number("temperature", temperature, temperature > 0.0 && temperature.is_finite(), "a number above 0")?;
                number("threshold", threshold, threshold.is_finite(), "a finite number")
            }
            Self::Sparse { k, bias_rate, .. } => {
                whole("k", k, 1..=r)?;
                number(
                    "bias_rate",
                    bias_rate,
                    bias_rate >= 0.0 && bias_rate.is_finite(),
                    "a finite number of 0 or more",
                )
            }
            Self::Top1 {} | Self::Dense {} | Self::Label {} => Ok(()),
        }
    }

    /// Gates of rows `z [n, width of z]`, `width` weights each.
    pub(crate) fn forward(&self, z: &[f32], n: usize, width: usize, context: &Context<'_>) -> Gated {
        let probabilities = !self.is_by_rank() && *self != (Self::Label {});
        let mut gated = Gated {
            weights: vec![0.0; n * width],
            p: if probabilities { z.to_vec() } else { Vec::new() },
            chosen: vec![false; n * width],
        };
        if probabilities {
            gated.p.chunks_exact_mut(width).for_each(softmax);
        }
        let z_width = z.len() / n.max(1);
        for row in 0..n {
            let z = &z[row * z_width..(row + 1) * z_width];
            let range = row * width..(row + 1) * width;
            let p = if probabilities { &gated.p[range.clone()] } else { &[] };
            let (weights, chosen) = (&mut gated.weights[range.clone()], &mut gated.chosen[range]);
            match *self {
                Self::TopK { k } => renormalized(p, &best(p)[..k.min(width)], weights, chosen),
                Self::TopP { top_p } => {
                    let order = best(p);
                    let mut sum = 0.0;
                    let reached = order.iter().position(|i| {
                        sum += f64::from(p[*i]);
                        sum >= top_p
                    });
                    renormalized(p, &order[..reached.map_or(width, |at| at + 1)], weights, chosen);
                }
                Self::Top1 {} => {
                    let first = best(p)[0];
                    (weights[first], chosen[first]) = (1.0, true);
                }
                Self::Dense {} => {
                    weights.copy_from_slice(p);
                    chosen.fill(true);
                }
                Self::Label {} => {
                    if let Some(expert) = (context.labels)(row).filter(|expert| *expert < width) {
                        (weights[expert], chosen[expert]) = (1.0, true);
                    }
                }
                Self::Uncertain { q, threshold, top_p, keep_top_k, epsilon } => {
                    let uncertain = entropy(p, q, epsilon) > threshold;
                    let mut sum = 0.0;
                    for (position, i) in best(p).into_iter().enumerate() {
                        sum += f64::from(p[i]);
                        if uncertain || position < keep_top_k || sum <= top_p {
                            (weights[i], chosen[i]) = (p[i], true);
                        }
                    }
                }
                Self::Ranks { k, partition, .. } => {
                    let score: Vec<f32> = (0..width).map(|i| sigmoid(z[i / partition]) + context.bias[i]).collect();
                    let order = best(&score);
                    let sum: f32 = order[..k].iter().map(|i| score[*i]).sum();
                    for i in &order[..k] {
                        (weights[*i], chosen[*i]) = (k as f32 * score[*i] / sum, true);
                    }
                }
                Self::SelfActivated { k, temperature, threshold } => {
                    let norm = norm(z);
                    let hat: Vec<f32> = z.iter().map(|z| z / norm).collect();
                    let order = best(&hat);
                    let kept = &order[..k.min(width)];
                    let mut values: Vec<f32> = kept.iter().map(|i| hat[*i] / temperature as f32).collect();
                    softmax(&mut values);
                    for (i, w) in kept.iter().zip(values) {
                        let used = context.training || f64::from(hat[*i]) >= threshold;
                        (weights[*i], chosen[*i]) = (if used { w } else { 0.0 }, true);
                    }
                }
                Self::Sparse { k, score, .. } => {
                    let value = |i: usize| match score {
                        Score::Signed => z[i] + context.bias[i],
                        Score::Magnitude => (z[i] + context.bias[i]).abs(),
                    };
                    for i in &best(&(0..width).map(value).collect::<Vec<_>>())[..k] {
                        (weights[*i], chosen[*i]) = (1.0, true);
                    }
                }
            }
        }
        gated
    }

    /// The gradient at `z` from that at the weights, and one at the probabilities beside it (`[n, N]`, empty for none).
    pub(crate) fn backward(
        &self,
        z: &[f32],
        n: usize,
        width: usize,
        (gated, dw, dp): (&Gated, &[f32], &[f32]),
        context: &Context<'_>,
    ) -> Vec<f32> {
        let z_width = z.len() / n.max(1);
        let mut dz = vec![0.0; z.len()];
        for row in 0..n {
            let range = row * width..(row + 1) * width;
            let (w, dw, chosen) = (&gated.weights[range.clone()], &dw[range.clone()], &gated.chosen[range.clone()]);
            let z = &z[row * z_width..(row + 1) * z_width];
            let dz = &mut dz[row * z_width..(row + 1) * z_width];
            if gated.p.is_empty() {
                self.rank_backward(z, (w, dw, chosen), dz, context);
                continue;
            }
            let p = &gated.p[range.clone()];
            let mut d: Vec<f32> = if dp.is_empty() { vec![0.0; width] } else { dp[range].to_vec() };
            match self {
                Self::TopK { .. } | Self::TopP { .. } => {
                    let sum: f32 = (0..width).filter(|i| chosen[*i]).map(|i| p[i]).sum();
                    let dot: f32 = dw.iter().zip(w).map(|(dw, w)| dw * w).sum();
                    (0..width).filter(|i| chosen[*i]).for_each(|i| d[i] += (dw[i] - dot) / sum);
                }
                Self::Dense {} | Self::Uncertain { .. } => {
                    (0..width).filter(|i| chosen[*i]).for_each(|i| d[i] += dw[i]);
                }
                _ => {}
            }
            let dot: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
            dz.iter_mut().zip(d.iter().zip(p)).for_each(|(dz, (d, p))| *dz = p * (d - dot));
        }
        dz
    }

    fn rank_backward(
        &self,
        z: &[f32],
        (w, dw, chosen): (&[f32], &[f32], &[bool]),
        dz: &mut [f32],
        context: &Context<'_>,
    ) {
        let all = || (0..w.len()).filter(|i| chosen[*i]);
        match *self {
            Self::Ranks { k, partition, .. } => {
                let sum: f32 = all().map(|i| sigmoid(z[i / partition]) + context.bias[i]).sum();
                let dot: f32 = all().map(|i| dw[i] * w[i] / k as f32).sum();
                for i in all() {
                    let s = sigmoid(z[i / partition]);
                    dz[i / partition] += k as f32 / sum * (dw[i] - dot) * s * (1.0 - s);
                }
            }
            Self::SelfActivated { temperature, .. } => {
                let norm = norm(z);
                // what the threshold zeroed has no gradient, but only outside of training is there any
                let dot: f32 = all().map(|i| dw[i] * w[i]).sum();
                let mut d_hat = vec![0.0; w.len()];
                all().for_each(|i| d_hat[i] = w[i] * (dw[i] - dot) / temperature as f32);
                let along: f32 = d_hat.iter().zip(z).map(|(d, z)| d * z / norm).sum();
                dz.iter_mut().zip(d_hat.iter().zip(z)).for_each(|(dz, (d, z))| *dz = (d - z / norm * along) / norm);
            }
            _ => {}
        }
    }
}

fn renormalized(p: &[f32], kept: &[usize], weights: &mut [f32], chosen: &mut [bool]) {
    let sum: f32 = kept.iter().map(|i| p[*i]).sum();
    kept.iter().for_each(|i| (weights[*i], chosen[*i]) = (p[*i] / sum, true));
}

/// Indices, largest value first, then lowest index.
fn best(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    order
}

fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|z| *z = (*z - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|z| *z /= sum);
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

/// Length of a vector, never 0.
fn norm(z: &[f32]) -> f32 {
    z.iter().map(|z| f64::from(*z).powi(2)).sum::<f64>().sqrt().max(1e-12) as f32
}

/// Distance from q = 1 within which the entropy is Shannon's: nearer, the rounding of probabilities would be more than
/// the difference.
const SHANNON: f64 = 1e-4;

/// `S_q(p + epsilon) / max S_q` with `S_q = (1 - sum p^q) / (q - 1)`, for q = 1 Shannon's entropy over `ln N`.
pub(crate) fn entropy(p: &[f32], q: f64, epsilon: f64) -> f64 {
    let p = p.iter().map(|p| f64::from(*p) + epsilon);
    let n = p.len() as f64;
    if p.len() < 2 {
        return 0.0;
    }
    match (q - 1.0).abs() < SHANNON {
        true => -p.map(|p| if p > 0.0 { p * p.ln() } else { 0.0 }).sum::<f64>() / n.ln(),
        false => (1.0 - p.map(|p| p.powf(q)).sum::<f64>()) / (1.0 - n.powf(1.0 - q)),
    }
}

/// Its derivative with respect to each `p`.
pub(crate) fn entropy_gradient(p: &[f32], q: f64, epsilon: f64) -> impl Iterator<Item = f64> {
    let n = p.len() as f64;
    let single = p.len() < 2;
    p.iter().map(move |p| {
        let p = (f64::from(*p) + epsilon).max(1e-30);
        match (single, (q - 1.0).abs() < SHANNON) {
            (true, _) => 0.0,
            (_, true) => -(p.ln() + 1.0) / n.ln(),
            (_, false) => -q * p.powf(q - 1.0) / (1.0 - n.powf(1.0 - q)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNLABELED: &dyn Fn(usize) -> Option<usize> = &|_| None;

    fn context(bias: &[f32], training: bool) -> Context<'_> {
        Context { training, bias, labels: UNLABELED }
    }

    fn close(found: &[f32], expected: &[f32]) -> bool {
        found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-6)
    }

    fn logits(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn tsallis_entropy_keeps_all_or_the_top() {
        let p = [0.4, 0.3, 0.2, 0.1];
        assert!((entropy(&p, 1.1, 1e-5) - 0.921_699).abs() < 2e-6, "{}", entropy(&p, 1.1, 1e-5));
        assert!((entropy(&p, 1.1, 0.0) - 0.921_992).abs() < 2e-6);
        assert!((entropy(&[0.97, 0.01, 0.01, 0.01], 1.1, 1e-5) - 0.108_070).abs() < 2e-6);
        assert!((entropy(&[0.97, 0.01, 0.01, 0.01], 1.1, 0.0) - 0.108_315).abs() < 2e-6);
        assert!((entropy(&[0.25; 4], 1.7, 0.0) - 1.0).abs() < 1e-12);
        for (q, tolerance) in [(1.01, 5e-3), (1.001, 5e-4), (1.000_001, 1e-9)] {
            assert!((entropy(&p, q, 0.0) - entropy(&p, 1.0, 0.0)).abs() < tolerance, "{q}");
        }
        let gate = |threshold| Gate::Uncertain { q: 1.1, threshold, top_p: 0.75, keep_top_k: 2, epsilon: 1e-5 };
        let weights = |threshold, p: &[f32]| gate(threshold).forward(&logits(p), 1, 4, &context(&[], true)).weights;
        assert!(close(&weights(0.9, &p), &p));
        assert!(close(&weights(1.0, &p), &[0.4, 0.3, 0.0, 0.0]));
        assert!(close(&weights(0.9, &[0.97, 0.01, 0.01, 0.01]), &[0.97, 0.01, 0.0, 0.0]));
    }

    #[test]
    fn ranks_by_biased_sigmoid() {
        let gate = Gate::Ranks { k: 2, partition: 1, bias_rate: 0.0 };
        let found = gate.forward(&[0.0, 1.0, -1.0, 2.0], 1, 4, &context(&[0.5, 0.0, 0.0, -1.0], true));
        assert!(close(&found.weights, &[1.155_362, 0.844_638, 0.0, 0.0]), "{:?}", found.weights);
    }

    #[test]
    fn atoms_choose_themselves_by_sign() {
        let gate = Gate::SelfActivated { k: 2, temperature: 0.1, threshold: 0.25 };
        let z = [3.0, 4.0, 0.0, -12.0];
        let found = gate.forward(&z, 1, 4, &context(&[], true)).weights;
        assert!(close(&found, &[0.316_646, 0.683_354, 0.0, 0.0]), "{found:?}");
        // 3/13 is below the threshold, and nothing is renormalized
        let found = gate.forward(&z, 1, 4, &context(&[], false)).weights;
        assert!(close(&found, &[0.0, 0.683_354, 0.0, 0.0]));
    }

    #[test]
    fn sparse_projections_choose_by_value_or_magnitude() {
        let weights = |score| {
            let gate = Gate::Sparse { k: 2, score, bias_rate: 0.0 };
            gate.forward(&[1.0, -5.0, 0.5, 0.4], 1, 4, &context(&[0.0, 0.0, 0.0, 0.2], true)).weights
        };
        assert_eq!(weights(Score::Signed), [1.0, 0.0, 0.0, 1.0]);
        assert_eq!(weights(Score::Magnitude), [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn top_k_renormalizes_and_ties_go_to_the_lower_index() {
        let weights = |gate: Gate, p: &[f32]| gate.forward(&logits(p), 1, p.len(), &context(&[], true)).weights;
        assert!(close(&weights(Gate::TopK { k: 2 }, &[0.1, 0.6, 0.3]), &[0.0, 2.0 / 3.0, 1.0 / 3.0]));
        assert!(close(&weights(Gate::TopK { k: 2 }, &[0.25; 4]), &[0.5, 0.5, 0.0, 0.0]));
        assert!(close(&weights(Gate::TopK { k: 3 }, &[1.0]), &[1.0]));
        assert!(close(&weights(Gate::TopP { top_p: 0.8 }, &[0.1, 0.6, 0.3]), &[0.0, 2.0 / 3.0, 1.0 / 3.0]));
        assert_eq!(weights(Gate::Top1 {}, &[0.2, 0.4, 0.4]), [0.0, 1.0, 0.0]);
        let labels: &dyn Fn(usize) -> Option<usize> = &|row| (row == 1).then_some(2);
        let context = Context { training: true, bias: &[], labels };
        assert_eq!(Gate::Label {}.forward(&[], 2, 3, &context).weights, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn gradients_are_those_of_difference_quotients() {
        let z = [0.3f32, -0.4, 1.1, 0.2, 0.9, -0.2];
        let (dw, dp) = ([0.5f32, -1.0, 0.7, 0.2, -0.3, 0.8], [0.2f32, 0.1, -0.4, 0.3, 0.6, -0.5]);
        let bias = [0.1, 0.0, 0.2, 0.0, -0.1, 0.05];
        for gate in [
            Gate::TopK { k: 3 },
            Gate::TopP { top_p: 0.6 },
            Gate::Top1 {},
            Gate::Dense {},
            Gate::Uncertain { q: 1.1, threshold: 2.0, top_p: 0.7, keep_top_k: 2, epsilon: 1e-5 },
            Gate::Ranks { k: 3, partition: 1, bias_rate: 0.0 },
            Gate::SelfActivated { k: 3, temperature: 0.4, threshold: 0.2 },
        ] {
            let context = context(&bias, true);
            let value = |z: &[f32]| {
                let gated = gate.forward(z, 1, 6, &context);
                let sum =
                    |d: &[f32], v: &[f32]| d.iter().zip(v).map(|(d, v)| f64::from(*d) * f64::from(*v)).sum::<f64>();
                let constant = gate == (Gate::Top1 {});
                (if constant { 0.0 } else { sum(&dw, &gated.weights) }) + sum(&dp, &gated.p)
            };
            let gated = gate.forward(&z, 1, 6, &context);
            let found = gate.backward(&z, 1, 6, (&gated, &dw, &dp), &context);
            for i in 0..6 {
                let h = 1e-2;
                let at = |h: f32| {
                    let mut z = z;
                    z[i] += h;
                    value(&z)
                };
                let quotient = (at(h) - at(-h)) / (2.0 * f64::from(h));
                assert!((quotient - f64::from(found[i])).abs() < 2e-3, "{gate:?} {i}: {} {quotient}", found[i]);
            }
        }
    }

    #[test]
    fn the_derivative_of_the_entropy_is_its_slope() {
        let p = [0.4f32, 0.3, 0.2, 0.1];
        for q in [1.0, 1.1, 2.0] {
            for (i, slope) in entropy_gradient(&p, q, 1e-5).enumerate() {
                let at = |h: f32| {
                    let mut p = p;
                    p[i] += h;
                    entropy(&p, q, 1e-5)
                };
                assert!(((at(1e-3) - at(-1e-3)) / 2e-3 - slope).abs() < 1e-3);
            }
        }
    }
}
