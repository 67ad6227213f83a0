//! Dynamic Logits Fusion: what tuning changed in small models, added to a large one.

use serde::{Deserialize, Serialize};

use super::{LogitMix, mix::log_softmax};
use crate::error::{Error, Result};

/// Adds to the logits of a large model what tuning changed in small ones: `z = z_L + sum_t alpha_t (z_t1 - z_t0)`, over
/// pairs of a small tuned model and the small base it was tuned from. `alpha_t` is decided at every step, so that the
/// large model moves as far as the small ones did: `KL(P_alpha || P_L) = KL(Q_t1 || Q_t0)` for one pair, and least
/// squares over the pairs for several (arXiv 2406.15480).
///
/// For one pair `KL(P_alpha || P_L)` grows with alpha, since its derivative is alpha times the variance of the
/// difference under `P_alpha`: bisection finds the only solution, `max_alpha` where there is none below it. Several
/// pairs begin with their own solutions divided by their number, and are then improved one after the other. With a
/// fixed [`alpha`](Self::alpha) it is proxy tuning (arXiv 2401.08565).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fusion {
    /// The largest weight of a pair, above 0.
    pub max_alpha: f64,
    /// The weight of every pair at every step, instead of one by divergence.
    pub alpha: Option<f64>,
    /// Rounds over several pairs.
    pub sweeps: usize,
    /// Share of the large model's largest probability below which a token is excluded, as in contrastive decoding; none
    /// is by default.
    pub plausible: Option<f64>,
    /// Number of pairs: two more sources each, the tuned one first.
    pub pairs: usize,
}

impl Default for Fusion {
    fn default() -> Self {
        Self { max_alpha: 2.0, alpha: None, sweeps: 3, plausible: None, pairs: 1 }
    }
}

impl Fusion {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.max_alpha > 0.0 && self.max_alpha.is_finite()) {
            return Err(Error::input("max_alpha", self.max_alpha, "a finite number above 0"));
        }
        if let Some(alpha) = self.alpha.filter(|alpha| !alpha.is_finite()) {
            return Err(Error::input("alpha", alpha, "a finite number"));
        }
        if let Some(plausible) = self.plausible.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            return Err(Error::input("plausible", plausible, "a share in (0, 1]"));
        }
        if self.pairs == 0 {
            return Err(Error::input("pairs", 0, "at least one tuned model with its base"));
        }
        Ok(())
    }

    /// The weights of the pairs, given the large model's log-probabilities, the pairs' differences, and how far each
    /// pair moved.
    fn alphas(&self, large: &[f64], deltas: &[Vec<f64>], moved: &[f64]) -> Vec<f64> {
        if let Some(alpha) = self.alpha {
            return vec![alpha; deltas.len()];
        }
        let far = |alphas: &[f64]| -> f64 {
            let at = |v: usize| large[v] + alphas.iter().zip(deltas).map(|(a, d)| a * d[v]).sum::<f64>();
            divergence(&(0..large.len()).map(at).collect::<Vec<_>>(), large)
        };
        let with = |alphas: &[f64], t: usize, alpha: f64| -> f64 {
            let mut all = alphas.to_vec();
            all[t] = alpha;
            far(&all)
        };
        let none = vec![0.0; deltas.len()];
        let single = |t: usize| bisect(|alpha| with(&none, t, alpha), moved[t], self.max_alpha);
        let mut alphas: Vec<f64> = (0..deltas.len()).map(|t| single(t) / deltas.len() as f64).collect();
        if deltas.len() == 1 {
            return alphas;
        }
        // sum over the pairs of (KL - moved_t)^2 is least where KL is the mean of what they moved
        let target = moved.iter().sum::<f64>() / moved.len() as f64;
        for _ in 0..self.sweeps {
            for t in 0..deltas.len() {
                alphas[t] = least(|alpha| (with(&alphas, t, alpha) - target).abs(), self.max_alpha, alphas[t]);
            }
        }
        alphas
    }
}

/// `KL(softmax(row) || exp(large))`, of log-probabilities `large`.
fn divergence(row: &[f64], large: &[f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + row.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    let term = |(z, large): (&f64, &f64)| {
        let log = z - log_sum;
        if log.is_finite() && large.is_finite() { log.exp() * (log - large) } else { 0.0 }
    };
    row.iter().zip(large).map(term).sum()
}

/// Where a growing function reaches a value, on `[0, most]`.
fn bisect(f: impl Fn(f64) -> f64, value: f64, most: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    if f(most) < value {
        return most;
    }
    let (mut low, mut high) = (0.0, most);
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if f(middle) < value { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// A place on `[0, most]` where a function is least, by grids around the best point; not worse than at `start`.
fn least(f: impl Fn(f64) -> f64, most: f64, start: f64) -> f64 {
    let mut best = (f(start), start);
    let (mut low, mut step) = (0.0, most / 20.0);
    for _ in 0..6 {
        for i in 0..=20 {
            let alpha = (low + step * f64::from(i)).clamp(0.0, most);
            let value = f(alpha);
            if value < best.0 {
                best = (value, alpha);
            }
        }
        low = best.1 - step;
        step /= 10.0;
    }
    best.1
}

impl LogitMix for Fusion {
    fn sources(&self) -> usize {
        1 + 2 * self.pairs
    }

    fn mix(&self, logits: &[&[f32]]) -> Vec<f32> {
        let large = log_softmax(logits[0]);
        let (mut deltas, mut moved) = (Vec::new(), Vec::new());
        for pair in logits[1..].chunks_exact(2) {
            let (tuned, base) = (log_softmax(pair[0]), log_softmax(pair[1]));
            moved.push(divergence(&tuned, &base));
            // what both exclude has not changed
            let delta = |(a, b): (&f64, &f64)| if (a - b).is_finite() { a - b } else { 0.0 };
            deltas.push(tuned.iter().zip(&base).map(delta).collect::<Vec<f64>>());
        }
        let alphas = self.alphas(&large, &deltas, &moved);
        let cut = self.plausible.map(|share| large.iter().copied().fold(f64::NEG_INFINITY, f64::max) + share.ln());
        let changes = alphas.iter().any(|alpha| *alpha != 0.0);
        let score = |v: usize| match cut {
            Some(cut) if large[v] < cut => f32::NEG_INFINITY,
            // the large model's own logits to the bit
            _ if !changes => logits[0][v],
            _ => (large[v] + alphas.iter().zip(&deltas).map(|(a, d)| a * d[v]).sum::<f64>()) as f32,
        };
        (0..large.len()).map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(seed: usize) -> Vec<f32> {
        (0..12).map(|i| (((i * i * 7 + i * 5 + seed * 13) % 19) as f32 - 9.0) * 0.35).collect()
    }

    fn alpha(large: &[f32], tuned: &[f32], base: &[f32]) -> f64 {
        let (large, tuned, base) = (log_softmax(large), log_softmax(tuned), log_softmax(base));
        let delta: Vec<f64> = tuned.iter().zip(&base).map(|(a, b)| a - b).collect();
        Fusion::default().alphas(&large, &[delta], &[divergence(&tuned, &base)])[0]
    }

    #[test]
    fn nothing_tuned_changes_nothing_and_the_small_base_itself_becomes_the_tuned_model() {
        let (large, tuned, base) = (row(1), row(2), row(3));
        assert_eq!(alpha(&large, &base, &base), 0.0);
        assert_eq!(Fusion::default().mix(&[&large, &base, &base]), large);
        assert!((alpha(&base, &tuned, &base) - 1.0).abs() < 1e-9);
        let found = log_softmax(&Fusion::default().mix(&[&base, &tuned, &base]));
        assert!(found.iter().zip(log_softmax(&tuned)).all(|(a, b)| (a - b).abs() < 1e-4));
        let none = Fusion { alpha: Some(0.0), ..Fusion::default() };
        assert_eq!(none.mix(&[&large, &tuned, &base]), large);
    }

    #[test]
    fn bisection_finds_what_a_fine_grid_finds() {
        for seed in 0..6 {
            let (large, tuned, base) = (row(seed), row(seed + 7), row(seed + 3));
            let found = alpha(&large, &tuned, &base);
            let (l, t, b) = (log_softmax(&large), log_softmax(&tuned), log_softmax(&base));
            let target = divergence(&t, &b);
            let value = |alpha: f64| {
                let row: Vec<f64> = l.iter().zip(t.iter().zip(&b)).map(|(l, (t, b))| l + alpha * (t - b)).collect();
                (divergence(&row, &l) - target).abs()
            };
            let grid =
                (0..=20_000).map(|i| f64::from(i) * 1e-4).min_by(|a, b| value(*a).total_cmp(&value(*b))).unwrap();
            assert!((found - grid).abs() < 2e-4, "{seed}: {found} {grid}");
        }
    }

    #[test]
    fn the_derivative_of_the_divergence_is_alpha_times_the_variance() {
        let (l, d) = (log_softmax(&row(4)), log_softmax(&row(9)));
        let at = |alpha: f64| -> Vec<f64> { l.iter().zip(&d).map(|(l, d)| l + alpha * d).collect() };
        let numeric = (divergence(&at(1.3 + 1e-5), &l) - divergence(&at(1.3 - 1e-5), &l)) / 2e-5;
        let row = at(1.3);
        let sum: f64 = row.iter().map(|z| z.exp()).sum();
        let p: Vec<f64> = row.iter().map(|z| z.exp() / sum).collect();
        let mean: f64 = p.iter().zip(&d).map(|(p, d)| p * d).sum();
        let variance: f64 = p.iter().zip(&d).map(|(p, d)| p * (d - mean).powi(2)).sum();
        assert!((numeric - 1.3 * variance).abs() < 1e-6);
    }

    #[test]
    fn a_constant_on_the_small_logits_changes_nothing_and_equal_pairs_share_one_solution() {
        let (large, tuned, base) = (row(1), row(2), row(3));
        let more: Vec<f32> = tuned.iter().map(|z| z + 5.0).collect();
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        let one = Fusion::default();
        assert!(close(&one.mix(&[&large, &tuned, &base]), &one.mix(&[&large, &more, &base])));
        // a change so small that the large model can follow it
        let tuned: Vec<f32> = base.iter().zip(row(2)).map(|(base, more)| base + 0.2 * more).collect();
        assert!(alpha(&large, &tuned, &base) < 2.0);
        let found = Fusion { pairs: 2, ..one }.mix(&[&large, &tuned, &base, &tuned, &base]);
        let single = one.mix(&[&large, &tuned, &base]);
        assert!(found.iter().zip(&single).all(|(a, b)| (a - b).abs() < 1e-2), "{found:?} {single:?}");
        // excluded by both small models
        let (mut t, mut b) = (tuned.clone(), base.clone());
        (t[3], b[3]) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        assert!(one.mix(&[&large, &t, &b]).iter().all(|z| z.is_finite()));
        let plausible = Fusion { plausible: Some(1.0), ..one }.mix(&[&large, &tuned, &base]);
        assert_eq!(plausible.iter().filter(|z| z.is_finite()).count(), 1);
    }
}
