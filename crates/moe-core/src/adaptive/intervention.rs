//! Steering toward experts, or away from them.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::RunTimeRouting;
use crate::{
    Model,
    error::{Error, Result},
    overlay::{LogitTransform, RouterTokens, RuleGradients},
};

/// Changes the logits of some experts in some layers, before anything is selected: how the study of multilingual
/// routing steers middle layers toward the experts of a task. Where weights are a softmax, a soft intervention changes
/// them, too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intervention {
    /// The experts, layer by layer.
    pub at: Vec<LayerExperts>,
    /// What happens to their logits.
    pub mode: Steering,
}

/// Some experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerExperts {
    /// Decoder layer.
    pub layer: usize,
    /// Its experts.
    pub experts: Vec<u32>,
}

/// What an intervention does to the logits of its experts. For a token, `z` are all of its logits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Steering {
    /// `z_e + lambda std(z)`; toward the expert, or away from it. The study takes |lambda| up to 1.
    Soft {
        /// The strength, in [-1, 1].
        lambda: f64,
    },
    /// `max(z)` and a little more: the size of a normal number of this standard deviation, so that several experts do
    /// not tie and all come before the largest. The study's is 1e-6, of which it does not say whether it is a variance.
    Hard {
        /// The standard deviation, 0 or more.
        #[serde(default = "noise")]
        noise: f64,
        /// Its seed.
        #[serde(default)]
        seed: u64,
    },
    /// Minus infinity: no token goes there.
    Ban {},
}

fn noise() -> f64 {
    1e-6
}

impl Intervention {
    /// The changes of a model's logits.
    ///
    /// # Errors
    /// [`Error::Input`] for layers without experts, named twice, experts that do not exist, numbers out of range, and
    /// bans that leave fewer experts than a token goes to.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        match self.mode {
            Steering::Soft { lambda } if !(-1.0..=1.0).contains(&lambda) => {
                return Err(Error::input("lambda", lambda, "a number in [-1, 1]"));
            }
            Steering::Hard { noise, .. } if !(noise >= 0.0 && noise.is_finite()) => {
                return Err(Error::input("noise", noise, "a finite number of 0 or more"));
            }
            _ => {}
        }
        let mut layers: BTreeMap<usize, Arc<dyn LogitTransform>> = BTreeMap::new();
        for LayerExperts { layer, experts } in &self.at {
            let Some(moe) = model.config().moe(*layer) else {
                return Err(Error::input("layer of an intervention", layer, "one with routed experts"));
            };
            let count = moe.num_experts();
            if let Some(expert) = experts.iter().find(|e| **e as usize >= count) {
                return Err(Error::input(
                    format!("expert to steer in layer {layer}"),
                    expert,
                    format!("below {count}"),
                ));
            }
            let k = model.router().top_k();
            if matches!(self.mode, Steering::Ban {}) && count.saturating_sub(experts.len()) < k {
                let expected = format!("at most {}, so that {k} are left", count.saturating_sub(k));
                return Err(Error::input(format!("banned experts of layer {layer}"), experts.len(), expected));
            }
            let steered = Steered { experts: experts.clone(), mode: self.mode };
            if layers.insert(*layer, Arc::new(steered)).is_some() {
                return Err(Error::input(format!("interventions in layer {layer}"), "two", "one"));
            }
        }
        Ok(RunTimeRouting { logits: layers, ..RunTimeRouting::default() })
    }
}

/// The intervention in one layer.
#[derive(Debug)]
struct Steered {
    experts: Vec<u32>,
    mode: Steering,
}

/// Mean and standard deviation, over all experts.
fn moments(logits: &[f32]) -> (f64, f64) {
    let n = logits.len().max(1) as f64;
    let mean = logits.iter().map(|z| f64::from(*z)).sum::<f64>() / n;
    let variance = logits.iter().map(|z| (f64::from(*z) - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

fn largest(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, e| if logits[e] > logits[best] { e } else { best })
}

impl LogitTransform for Steered {
    fn forward(&self, tokens: &RouterTokens<'_>) -> Result<Vec<f32>> {
        let mut out = tokens.logits.to_vec();
        if matches!(self.mode, Steering::Soft { lambda: 0.0 }) {
            return Ok(out);
        }
        for (t, (row, own)) in
            out.chunks_exact_mut(tokens.experts).zip(tokens.logits.chunks_exact(tokens.experts)).enumerate()
        {
            match self.mode {
                Steering::Soft { lambda } => {
                    let step = (lambda * moments(own).1) as f32;
                    self.experts.iter().for_each(|e| row[*e as usize] += step);
                }
                Steering::Hard { noise, seed } => {
                    let mut random = ChaCha8Rng::seed_from_u64(seed);
                    random.set_stream((tokens.layer as u64) << 32 | t as u64);
                    let max = own[largest(own)];
                    for e in &self.experts {
                        // above the largest even where the number is lost in rounding
                        let more = (noise * normal(&mut random).abs()) as f32;
                        row[*e as usize] = (max + more).max(max.next_up());
                    }
                }
                Steering::Ban {} => self.experts.iter().for_each(|e| row[*e as usize] = f32::NEG_INFINITY),
            }
        }
        Ok(out)
    }

    fn backward(&self, tokens: &RouterTokens<'_>, d_logits: &[f32], _: bool) -> Result<RuleGradients> {
        let mut out = d_logits.to_vec();
        if matches!(self.mode, Steering::Soft { lambda: 0.0 }) {
            return Ok(out.into());
        }
        for (d, own) in out.chunks_exact_mut(tokens.experts).zip(tokens.logits.chunks_exact(tokens.experts)) {
            let through: f64 = self.experts.iter().map(|e| f64::from(d[*e as usize])).sum();
            match self.mode {
                Steering::Soft { lambda } => {
                    let (mean, std) = moments(own);
                    let factor = lambda * through / (std.max(f64::MIN_POSITIVE) * own.len() as f64);
                    d.iter_mut().zip(own).for_each(|(d, z)| *d += (factor * (f64::from(*z) - mean)) as f32);
                }
                Steering::Hard { .. } => {
                    self.experts.iter().for_each(|e| d[*e as usize] = 0.0);
                    d[largest(own)] += through as f32;
                }
                Steering::Ban {} => self.experts.iter().for_each(|e| d[*e as usize] = 0.0),
            }
        }
        Ok(out.into())
    }
}

/// A number of the standard normal distribution (Box and Muller).
pub(super) fn normal(random: &mut ChaCha8Rng) -> f64 {
    let (u, v): (f64, f64) = (random.random(), random.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn steered(experts: Vec<u32>, mode: Steering) -> impl LogitTransform {
        Steered { experts, mode }
    }
}
