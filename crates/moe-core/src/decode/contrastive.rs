//! Contrastive decoding: a strong model without what a weak one prefers.

use serde::{Deserialize, Serialize};

use super::{LogitMix, mix::log_softmax};
use crate::error::{Error, Result};

/// Scores of the strong logits `a` against the weak ones `b`, for the tokens that are plausible to the strong model.
///
/// Source: order of operations as in SCMoE's code: `a` is divided by its temperature, tokens below
/// `max a + ln(alpha)` are excluded (equality stays), `b` is divided by its temperature, then the scores. The end of
/// the sequence may be chosen, which that code forbids.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Contrastive {
    /// Share of the largest strong probability that a token needs to be plausible, in (0, 1]; 1 is greedy.
    pub alpha: f64,
    /// Strength, 0 or more; 0 is the strong model among plausible tokens.
    pub beta: f64,
    /// Temperature of the strong model.
    pub strong_temperature: f64,
    /// Temperature of the weak model.
    pub weak_temperature: f64,
    /// The scores.
    pub contrast: Contrast,
}

/// How two rows of logits become scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contrast {
    /// `(1 + beta) a - beta b` (arXiv 2309.09117; SCMoE).
    #[default]
    Logits,
    /// `log softmax(a) - beta log softmax(b)`; at `beta` = 1 the objective of arXiv 2210.15097.
    LogRatio,
}

impl Default for Contrastive {
    fn default() -> Self {
        Self { alpha: 0.1, beta: 0.5, strong_temperature: 1.0, weak_temperature: 1.0, contrast: Contrast::default() }
    }
}

impl Contrastive {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.alpha > 0.0 && self.alpha <= 1.0) {
            return Err(Error::input("alpha", self.alpha, "a number in (0, 1]"));
        }
        if !(self.beta >= 0.0 && self.beta.is_finite()) {
            return Err(Error::input("beta", self.beta, "a finite number of 0 or more"));
        }
        let temperatures =
            [("strong_temperature", self.strong_temperature), ("weak_temperature", self.weak_temperature)];
        for (field, value) in temperatures {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::input(field, value, "a finite number above 0"));
            }
        }
        Ok(())
    }
}

impl LogitMix for Contrastive {
    fn sources(&self) -> usize {
        2
    }

    fn mix(&self, logits: &[&[f32]]) -> Vec<f32> {
        let scaled = |row: &[f32], t: f64| -> Vec<f32> { row.iter().map(|z| (f64::from(*z) / t) as f32).collect() };
        let (a, b) = (scaled(logits[0], self.strong_temperature), scaled(logits[1], self.weak_temperature));
        let max = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let cut = f64::from(max) + self.alpha.ln();
        let beta = self.beta;
        let (strong, weak): (Vec<f64>, Vec<f64>) = match self.contrast {
            Contrast::Logits => {
                let times = |row: &[f32], factor: f64| row.iter().map(|z| factor * f64::from(*z)).collect();
                (times(&a, 1.0 + beta), times(&b, beta))
            }
            Contrast::LogRatio => (log_softmax(&a), log_softmax(&b).into_iter().map(|z| beta * z).collect()),
        };
        let score = |(a, (strong, weak)): (&f32, (&f64, &f64))| match f64::from(*a) < cut {
            true => f32::NEG_INFINITY,
            // of a token that the weak model excludes, nothing is taken out
            false if beta == 0.0 || !weak.is_finite() => *strong as f32,
            false => (strong - weak) as f32,
        };
        a.iter().zip(strong.iter().zip(&weak)).map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::sampling::greedy;

    const A: [f32; 6] = [2.0, 1.8, -1.0, 0.5, 1.2, -4.0];
    const B: [f32; 6] = [3.0, 0.2, 0.4, 0.1, 2.5, -9.0];

    #[test]
    fn scores_are_those_of_the_formula_and_the_weak_models_preference_goes() {
        let found = Contrastive::default().mix(&[&A, &B]);
        for i in [0, 1, 3, 4] {
            assert!((found[i] - (1.5 * A[i] - 0.5 * B[i])).abs() < 1e-5);
        }
        // below 2 + ln 0.1 = -0.30
        assert!(found[2] == f32::NEG_INFINITY && found[5] == f32::NEG_INFINITY);
        assert_eq!((greedy(&A), greedy(&found)), (0, 1));
    }

    #[test]
    fn neutral_settings_are_greedy_and_the_strong_choice_is_always_plausible() {
        let beta = |beta| Contrastive { beta, ..Contrastive::default() };
        assert_eq!(greedy(&beta(0.0).mix(&[&A, &B])), greedy(&A));
        assert_eq!(greedy(&beta(0.7).mix(&[&A, &A])), greedy(&A));
        let strict = Contrastive { alpha: 1.0, ..Contrastive::default() }.mix(&[&A, &B]);
        assert_eq!(strict.iter().filter(|z| z.is_finite()).count(), 1);
        assert_eq!(greedy(&strict), greedy(&A));
        for alpha in [0.01, 0.3, 0.999] {
            assert!(Contrastive { alpha, ..Contrastive::default() }.mix(&[&A, &B])[0].is_finite());
        }
    }

    #[test]
    fn equality_at_the_cut_stays_and_temperature_comes_before_it() {
        let a = [0.0, -0.5, -0.8];
        let kept = |t: f64, alpha: f64| {
            let settings = Contrastive { alpha, strong_temperature: t, ..Contrastive::default() };
            settings.mix(&[&a, &[0.0; 3]]).iter().filter(|z| z.is_finite()).count()
        };
        // exactly max + ln(alpha): ln of this is -0.5 in f64
        let half = (-0.5f64).exp();
        assert!(half.ln() <= -0.5, "{}", half.ln());
        assert_eq!((kept(1.0, half), kept(1.0, half * 1.01), kept(1.0, 0.1), kept(0.1, 0.1)), (2, 1, 3, 1));
    }

    #[test]
    fn log_ratios_are_those_of_the_probabilities() {
        let settings = Contrastive { beta: 1.0, contrast: Contrast::LogRatio, ..Contrastive::default() };
        let found = settings.mix(&[&A, &B]);
        let p = |row: &[f32], i: usize| f64::from(row[i]).exp() / row.iter().map(|z| f64::from(*z).exp()).sum::<f64>();
        for i in [0, 1, 3, 4] {
            assert!((f64::from(found[i]) - (p(&A, i) / p(&B, i)).ln()).abs() < 1e-5);
        }
        assert!(Contrastive { alpha: 0.0, ..settings }.validate().unwrap_err().to_string().contains("alpha"));
        assert!(Contrastive { beta: -1.0, ..settings }.validate().unwrap_err().to_string().contains("beta"));
    }
}
