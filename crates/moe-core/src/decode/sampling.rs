//! How a token is chosen by its logits.

use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely token; the lower id on a tie.
    Greedy,
    /// Temperature and nucleus sampling: from the smallest set of tokens whose probability reaches `top_p`.
    TopP {
        /// Divides the logits; above 0.
        temperature: f32,
        /// In (0, 1].
        top_p: f32,
        /// Seed; every prompt has its own stream, so results do not depend on batching.
        seed: u64,
    },
}

impl Sampling {
    /// # Errors
    /// [`Error::Input`] names the parameter that is out of range.
    pub fn validate(&self) -> Result<()> {
        let Self::TopP { temperature, top_p, .. } = *self else { return Ok(()) };
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::input("temperature", temperature, "a finite number above 0"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::input("top_p", top_p, "a number in (0, 1]"));
        }
        Ok(())
    }

    /// The token for `random` in [0, 1).
    pub(crate) fn choose(&self, logits: &[f32], random: f32) -> u32 {
        match *self {
            Self::Greedy => greedy(logits),
            Self::TopP { temperature, top_p, .. } => {
                let nucleus = nucleus(logits, temperature, top_p);
                draw(&nucleus, random * nucleus.iter().map(|c| c.1).sum::<f32>())
            }
        }
    }

    /// What it draws from: probabilities over the vocabulary that sum to 1.
    pub(crate) fn distribution(&self, logits: &[f32]) -> Vec<f32> {
        let mut all = vec![0.0; logits.len()];
        match *self {
            Self::Greedy => all[greedy(logits) as usize] = 1.0,
            Self::TopP { temperature, top_p, .. } => {
                let nucleus = nucleus(logits, temperature, top_p);
                let sum: f32 = nucleus.iter().map(|c| c.1).sum();
                nucleus.iter().for_each(|(id, weight)| all[*id as usize] = weight / sum);
            }
        }
        all
    }
}

/// The most likely token; the lower id on a tie.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// The tokens of the nucleus and their weights, best first.
fn nucleus(logits: &[f32], temperature: f32, top_p: f32) -> Vec<(u32, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut candidates: Vec<(u32, f32)> =
        logits.iter().enumerate().map(|(i, l)| (i as u32, ((l - max) / temperature).exp())).collect();
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f32 = candidates.iter().map(|c| c.1).sum();
    let mut mass = 0.0;
    let nucleus = candidates
        .iter()
        .position(|c| {
            mass += c.1;
            mass >= top_p * total
        })
        .map_or(candidates.len(), |i| i + 1);
    candidates.truncate(nucleus);
    candidates
}

/// The token up to which the weights reach `remaining`.
fn draw(candidates: &[(u32, f32)], mut remaining: f32) -> u32 {
    for (id, weight) in candidates {
        if remaining < *weight {
            return *id;
        }
        remaining -= weight;
    }
    candidates.last().map_or(0, |candidate| candidate.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(logits: &[f32], temperature: f32, top_p: f32, random: f32) -> u32 {
        Sampling::TopP { temperature, top_p, seed: 0 }.choose(logits, random)
    }

    #[test]
    fn greedy_takes_the_lower_id_on_a_tie() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0]), 1);
    }

    #[test]
    fn sampling_stays_in_the_nucleus_and_follows_probabilities() {
        let logits = [0.0, 2.0, 1.0, -3.0];
        assert!((0..100).all(|i| sample(&logits, 1.0, 0.5, i as f32 / 100.0) == 1));
        let n = 10_000;
        let hits = (0..n).filter(|&i| sample(&logits, 1.0, 1.0, i as f32 / n as f32) == 2).count();
        let total: f64 = logits.iter().map(|l: &f32| (*l as f64).exp()).sum();
        assert!((hits as f64 / n as f64 - 1f64.exp() / total).abs() < 1e-3);
        assert_eq!(sample(&logits, 0.01, 1.0, 0.999), 1);
    }

    #[test]
    fn the_distribution_is_what_is_drawn_from() {
        let logits = [0.0, 2.0, 1.0, -3.0, f32::NEG_INFINITY];
        let sampling = Sampling::TopP { temperature: 0.8, top_p: 0.9, seed: 0 };
        let p = sampling.distribution(&logits);
        let n = 20_000;
        for (id, p) in p.iter().enumerate() {
            let hits = (0..n).filter(|&i| sampling.choose(&logits, i as f32 / n as f32) == id as u32).count();
            assert!((hits as f64 / n as f64 - f64::from(*p)).abs() < 1e-3, "{id}: {p}");
        }
        assert_eq!(Sampling::Greedy.distribution(&logits), [0.0, 1.0, 0.0, 0.0, 0.0]);
    }
}
