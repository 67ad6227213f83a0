//! Which experts a domain uses.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    adaptive::LayerExperts,
    error::{Error, Result},
    trace::{LayerTrace, Observer, Signals},
};

/// How tokens of a domain or language are routed: how often they go to each expert, and the mean shares of the experts
/// in the scores. An observer of plain sweeps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingProfile {
    layers: BTreeMap<usize, LayerProfile>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerProfile {
    tokens: u64,
    chosen: Vec<f64>,
    /// Sum over sequences of their mean shares.
    shares: Vec<f64>,
    sequences: u64,
}

impl RoutingProfile {
    /// Has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Share of the tokens of a layer that go to each expert `[E]`; they sum to the experts per token.
    pub fn frequencies(&self, layer: usize) -> Option<Vec<f64>> {
        let profile = self.layers.get(&layer).filter(|profile| profile.tokens > 0)?;
        Some(profile.chosen.iter().map(|n| n / profile.tokens as f64).collect())
    }

    /// The experts that this domain uses more often than `general` does by more than `tau`, in layers where there are
    /// some: how the study of multilingual routing finds the experts of a task.
    ///
    /// # Errors
    /// [`Error::Input`] for profiles of different models.
    pub fn experts_beyond(&self, general: &Self, tau: f64) -> Result<Vec<LayerExperts>> {
        self.check(general)?;
        let mut found = Vec::new();
        for layer in self.layers.keys() {
            let (Some(own), Some(other)) = (self.frequencies(*layer), general.frequencies(*layer)) else { continue };
            let more = |e: &u32| own[*e as usize] - other[*e as usize] > tau;
            let experts: Vec<u32> = (0..own.len() as u32).filter(more).collect();
            if !experts.is_empty() {
                found.push(LayerExperts { layer: *layer, experts });
            }
        }
        Ok(found)
    }

    /// Jensen-Shannon divergence of the mean shares of both domains in every layer, over the mean of their entropies:
    /// low where both are routed alike. The study does not say its normalizer; that it is the entropy is ours.
    ///
    /// # Errors
    /// [`Error::Input`] for profiles of different models, or of no tokens.
    pub fn divergences(&self, other: &Self) -> Result<Vec<(usize, f64)>> {
        self.check(other)?;
        let pairs = self.layers.iter().zip(other.layers.values());
        pairs
            .map(|((layer, a), b)| {
                if a.sequences == 0 || b.sequences == 0 {
                    return Err(Error::input(format!("sequences seen in layer {layer}"), 0, "at least one"));
                }
                let mean = |profile: &LayerProfile| -> Vec<f64> {
                    profile.shares.iter().map(|p| p / profile.sequences as f64).collect()
                };
                let (p, q) = (mean(a), mean(b));
                let middle: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (p + q) / 2.0).collect();
                let js = entropy(&middle) - (entropy(&p) + entropy(&q)) / 2.0;
                Ok((*layer, js / ((entropy(&p) + entropy(&q)) / 2.0).max(f64::MIN_POSITIVE)))
            })
            .collect()
    }

    /// The `count` neighboring layers with the least divergence together: the low part of its curve.
    ///
    /// # Errors
    /// As [`divergences`](Self::divergences); [`Error::Input`] for more layers than there are.
    pub fn shared_layers(&self, other: &Self, count: usize) -> Result<Vec<usize>> {
        let curve = self.divergences(other)?;
        if count == 0 || count > curve.len() {
            return Err(Error::input("layers to steer", count, format!("1 to {}", curve.len())));
        }
        let sum = |start: &usize| curve[*start..start + count].iter().map(|(_, d)| d).sum::<f64>();
        let start = (0..=curve.len() - count).min_by(|a, b| sum(a).total_cmp(&sum(b))).unwrap_or(0);
        Ok(curve[start..start + count].iter().map(|(layer, _)| *layer).collect())
    }

    fn check(&self, other: &Self) -> Result<()> {
        let shape = |profile: &Self| -> Vec<(usize, usize)> {
            profile.layers.iter().map(|(layer, of)| (*layer, of.chosen.len())).collect()
        };
        match shape(self) == shape(other) {
            true => Ok(()),
            false => {
                let (found, expected) = (format!("{:?}", shape(other)), format!("{:?}", shape(self)));
                Err(Error::input("layers and experts of the other profile", found, expected))
            }
        }
    }
}

fn entropy(p: &[f64]) -> f64 {
    -p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>()
}

impl Observer for RoutingProfile {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let experts = trace.experts.max(1);
        let profile = self.layers.entry(trace.layer).or_default();
        profile.chosen.resize(experts, 0.0);
        profile.shares.resize(experts, 0.0);
        for (&e, _) in trace.selected.iter().zip(trace.weights).filter(|(_, w)| **w != 0.0) {
            profile.chosen[e as usize] += 1.0;
        }
        profile.tokens += trace.wave.tokens as u64;
        for sequence in trace.wave.sequences.iter().filter(|sequence| !sequence.tokens.is_empty()) {
            let n = sequence.tokens.len() as f64;
            let rows = &trace.logits[sequence.tokens.start * experts..sequence.tokens.end * experts];
            for row in rows.chunks_exact(experts) {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|z| f64::from(z - max).exp()).sum();
                profile.shares.iter_mut().zip(row).for_each(|(p, z)| *p += f64::from(z - max).exp() / sum / n);
            }
            profile.sequences += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{SequenceInfo, WaveInfo};

    fn profile(rows: &[[f32; 4]], layers: usize) -> RoutingProfile {
        let n = rows.len();
        let wave = WaveInfo {
            id: 0,
            tokens: n,
            ids: Vec::new(),
            sequences: vec![SequenceInfo { tokens: 0..n, loss_tokens: 0 }],
        };
        let logits: Vec<f32> = rows.concat();
        let best = |row: &[f32; 4]| (0..4u32).fold(0, |b, e| if row[e as usize] > row[b as usize] { e } else { b });
        let selected: Vec<u32> = rows.iter().map(best).collect();
        let mut found = RoutingProfile::new();
        for layer in 0..layers {
            let (logits, selected, weights) = (&logits, &selected, &vec![1.0; n]);
            let trace = LayerTrace {
                layer,
                wave: &wave,
                experts: 4,
                top_k: 1,
                logits,
                selected,
                weights,
                scale: 1.0,
                idle: &[],
            };
            found.layer(&trace).unwrap();
        }
        found
    }

    #[test]
    fn the_experts_of_a_biased_router_are_found_and_equal_domains_do_not_diverge() {
        let general =
            profile(&[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]], 2);
        let task =
            profile(&[[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 3.0, 0.0], [3.0, 0.0, 0.0, 0.0]], 2);
        let found = task.experts_beyond(&general, 0.3).unwrap();
        assert_eq!(
            found.iter().map(|found| (found.layer, found.experts.clone())).collect::<Vec<_>>(),
            [(0, vec![2]), (1, vec![2])]
        );
        assert_eq!(task.frequencies(0).unwrap(), [0.25, 0.0, 0.75, 0.0]);
        assert!(general.divergences(&general).unwrap().iter().all(|(_, d)| d.abs() < 1e-12));
        assert!(task.divergences(&general).unwrap().iter().all(|(_, d)| *d > 0.01));
        assert_eq!(task.shared_layers(&general, 1).unwrap(), [0]);
        assert!(task.shared_layers(&general, 3).is_err() && task.divergences(&profile(&[[0.0; 4]], 1)).is_err());
        let json = serde_json::to_string(&task).unwrap();
        assert_eq!(serde_json::from_str::<RoutingProfile>(&json).unwrap(), task);
    }
}
