//! Routing: from router logits to experts and weights, and back.
//!
//! All semantics live in one enum-configured [`Router`], on the host: `[tokens, experts]` numbers are few, and every
//! backend then breaks ties the same way (the lower expert index wins).

mod dense;
mod dispatch;
mod removal;
mod selection;
mod sets;
mod sparsemixer;
mod table;

use moe_checkpoint::human::variant;
use moe_checkpoint::{GroupScore, Groups, Routing, RoutingKind};
use rayon::prelude::*;

pub use dispatch::{Dispatch, ExpertRows};
use selection::{GroupLimit, GroupRank};
pub use sets::Combine;

use crate::{
    error::{Error, Result},
    kernels::math,
    layers::softplus,
};

/// The routing rule of a model.
#[derive(Clone, Debug)]
pub struct Router {
    top_k: usize,
    scale: f32,
    /// Added to the sum of sigmoid weights before dividing by it.
    norm_eps: f32,
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    /// The largest scores of the best groups; the weights are the scores.
    Scores { score: Score, renormalize: bool, groups: Option<GroupLimit> },
    /// See [`sparsemixer`].
    Sparsemixer { jitter: f32 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Score {
    /// Softmax over all experts. A sum of selected scores below `floor` counts as `floor` when they are renormalized.
    Softmax { floor: f32 },
    /// Sigmoid of each logit.
    Sigmoid,
    /// Square root of the softplus of each logit.
    SqrtSoftplus,
}

/// Routing of a number of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    /// Experts, E.
    pub experts: usize,
    /// Experts per token, k.
    pub top_k: usize,
    /// Selected experts `[T, k]`, best first.
    pub selected: Vec<u32>,
    /// Routing weights as applied `[T, k]`.
    pub weights: Vec<f32>,
}

impl Router {
    /// Factor that all routing weights carry.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Router of a configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a rule this crate does not implement.
    pub fn new(routing: &Routing) -> Result<Self> {
        let softmax = Score::Softmax { floor: 0.0 };
        let rule = match &routing.kind {
            RoutingKind::SoftmaxTopK { renormalize } => {
                Rule::Scores { score: softmax, renormalize: *renormalize, groups: None }
            }
            // softmax over the selected logits is the renormalized softmax
            RoutingKind::TopKSoftmax => Rule::Scores { score: softmax, renormalize: true, groups: None },
            RoutingKind::SoftmaxGroupTopK { groups } => {
                Rule::Scores { score: softmax, renormalize: false, groups: Some(GroupLimit::new(groups)?) }
            }
            RoutingKind::SoftmaxCorrected { norm_min } => {
                let score = Score::Softmax { floor: norm_min.unwrap_or(0.0) as f32 };
                Rule::Scores { score, renormalize: norm_min.is_some(), groups: None }
            }
            RoutingKind::Sigmoid { renormalize, groups, .. } => {
                let groups = groups.as_ref().map(GroupLimit::new).transpose()?;
                Rule::Scores { score: Score::Sigmoid, renormalize: *renormalize, groups }
            }
            RoutingKind::SqrtSoftplus => Rule::Scores { score: Score::SqrtSoftplus, renormalize: true, groups: None },
            RoutingKind::Sparsemixer { jitter_eps } => Rule::Sparsemixer { jitter: *jitter_eps as f32 },
            other => return Err(Error::Unsupported(format!("routing {}", variant(&other)))),
        };
        Ok(Self { top_k: routing.top_k, scale: routing.scale, norm_eps: routing.norm_eps as f32, rule })
    }

    /// Whether the rule has a place for a bias on the selection.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for SparseMixer, which selects by logits alone.
    pub fn check_bias(&self) -> Result<()> {
        match self.rule {
            Rule::Scores { .. } => Ok(()),
            Rule::Sparsemixer { .. } => Err(Error::Unsupported(
                "a bias on the selection with SparseMixer routing, which selects by logits".into(),
            )),
        }
    }

    /// Whether the rule can route among `experts` experts.
    ///
    /// # Errors
    /// [`Error::Input`] if they do not form groups of equal size, or if the groups that are selected hold fewer than
    /// `top_k`.
    pub fn check(&self, experts: usize) -> Result<()> {
        let Rule::Scores { groups: Some(GroupLimit { count, top, .. }), .. } = self.rule else { return Ok(()) };
        if count == 0 || !experts.is_multiple_of(count) {
            return Err(Error::input(
                "routed experts of a layer",
                experts,
                format!("a multiple of its {count} groups"),
            ));
        }
        let reachable = experts / count * top.min(count);
        if reachable < self.top_k.min(experts) {
            let expected = format!("at least the {} experts per token", self.top_k);
            return Err(Error::input(format!("experts in {top} of {count} groups"), reachable, expected));
        }
        Ok(())
    }

    /// The same with at most `top_k` experts per token.
    pub fn at_most(&self, top_k: usize) -> Self {
        Self { top_k: self.top_k.min(top_k), ..self.clone() }
    }

    /// Routes tokens by `logits [T, E]`. A token goes to `min(top_k, E)` experts. `bias [E]` is added to the scores for
    /// the selection, not for the weights.
    pub fn route(&self, logits: &[f32], experts: usize, bias: Option<&[f32]>) -> Routed {
        let top_k = self.top_k.min(experts);
        let tokens = logits.len() / experts.max(1);
        let mut selected = vec![0u32; tokens * top_k];
        let mut weights = vec![0.0f32; tokens * top_k];
        if top_k > 0 {
            selected
                .par_chunks_mut(top_k)
                .zip(weights.par_chunks_mut(top_k))
                .zip(logits.par_chunks(experts))
                .with_min_len(64)
                .for_each_init(Vec::new, |scratch, ((selected, weights), logits)| {
                    self.select(logits, bias, selected, weights, scratch);
                    self.weigh(logits, selected, weights);
                });
        }
        Routed { experts, top_k, selected, weights }
    }

    /// Experts of a token. `values` and `scratch` are overwritten.
    fn select(
        &self,
        logits: &[f32],
        bias: Option<&[f32]>,
        selected: &mut [u32],
        values: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (score, groups) = match &self.rule {
            Rule::Scores { score, groups, .. } => (*score, *groups),
            Rule::Sparsemixer { .. } => return selection::largest(logits, selected, values),
        };
        let softmax = matches!(score, Score::Softmax { .. });
        if softmax && bias.is_none() && groups.is_none() {
            return selection::largest(logits, selected, values); // the softmax keeps their order
        }
        scratch.clear();
        scratch.extend_from_slice(logits);
        if !softmax {
            scratch.iter_mut().for_each(|z| *z = score.of(*z));
        } else if bias.is_some() || groups.is_some_and(|g| g.rank == GroupRank::TwoLargest) {
            let max = largest_logit(logits);
            let sum = softmax_sum(logits, max);
            scratch.iter_mut().for_each(|z| *z = math::exp(*z - max) / sum);
        }
        if let Some(bias) = bias {
            scratch.iter_mut().zip(bias).for_each(|(score, b)| *score += b);
        }
        if let Some(groups) = groups {
            groups.apply(scratch);
        }
        selection::largest(scratch, selected, values);
    }

    /// Routing weights of the experts selected for a token.
    fn weigh(&self, logits: &[f32], selected: &[u32], weights: &mut [f32]) {
        let scale = self.scale;
        let chosen = |slot: usize| logits[selected[slot] as usize];
        match self.rule {
            Rule::Sparsemixer { jitter } => {
                sparsemixer::weights(logits, selected, jitter, weights);
                weights.iter_mut().for_each(|w| *w *= scale);
            }
            Rule::Scores { score: score @ (Score::Sigmoid | Score::SqrtSoftplus), renormalize, .. } => {
                for (slot, weight) in weights.iter_mut().enumerate() {
                    *weight = score.of(chosen(slot));
                }
                let sum = if renormalize { weights.iter().sum::<f32>() + self.norm_eps } else { 1.0 };
                weights.iter_mut().for_each(|w| *w = *w / sum * scale);
            }
            Rule::Scores { score: Score::Softmax { floor }, renormalize, .. } => {
                let all = || (largest_logit(logits), softmax_sum(logits, largest_logit(logits)));
                let (max, sum) = if !renormalize {
                    all()
                } else if below_floor(logits, selected, floor) {
                    let (max, sum) = all();
                    (max, sum * floor)
                } else {
                    let max = (0..selected.len()).map(chosen).fold(f32::NEG_INFINITY, f32::max);
                    (max, (0..selected.len()).map(|slot| math::exp(chosen(slot) - max)).sum())
                };
                for (slot, weight) in weights.iter_mut().enumerate() {
                    *weight = math::exp(chosen(slot) - max) / sum * scale;
                }
            }
        }
    }

    /// Gradient with respect to the logits `[T, E]`, from the gradient of each routing weight `[T, k]`. The choice of
    /// experts is not differentiated.
    pub fn backward(&self, logits: &[f32], routed: &Routed, d_weights: &[f32]) -> Vec<f32> {
        let (experts, k) = (routed.experts, routed.top_k);
        let mut out = crate::kernels::zeros(logits.len());
        if k == 0 {
            return out;
        }
        out.par_chunks_mut(experts).zip(logits.par_chunks(experts)).enumerate().with_min_len(64).for_each(
            |(t, (out, logits))| {
                let slots = t * k..(t + 1) * k;
                let (selected, weights) = (&routed.selected[slots.clone()], &routed.weights[slots.clone()]);
                self.token_backward(logits, selected, weights, &d_weights[slots], out);
            },
        );
        out
    }

    fn token_backward(&self, logits: &[f32], selected: &[u32], weights: &[f32], dw: &[f32], out: &mut [f32]) {
        // w = scale * p, so sum(dw * w) = sum(d loss/dp * p)
        let inner: f32 = dw.iter().zip(weights).map(|(d, w)| d * w).sum();
        let slots = selected.iter().map(|&e| e as usize).zip(weights).zip(dw);
        match self.rule {
            Rule::Sparsemixer { jitter } => {
                sparsemixer::backward(logits, selected, jitter, dw, out);
                out.iter_mut().for_each(|d| *d *= self.scale);
            }
            Rule::Scores { score: score @ (Score::Sigmoid | Score::SqrtSoftplus), renormalize, .. } => {
                // p = s / sum(s), or s; ds = s (s'/s) dz
                for ((e, w), d) in slots {
                    let d = if renormalize { w * (d - inner / self.scale) } else { w * d };
                    out[e] = d * score.log_slope(logits[e]);
                }
            }
            Rule::Scores { score: Score::Softmax { floor }, renormalize, .. } => {
                if renormalize && !below_floor(logits, selected, floor) {
                    // p is a softmax over the selected logits only
                    for ((e, w), d) in slots {
                        out[e] = w * (d - inner / self.scale);
                    }
                } else {
                    // p is the softmax over all logits, times a constant
                    let max = largest_logit(logits);
                    let sum = softmax_sum(logits, max);
                    for (out, logit) in out.iter_mut().zip(logits) {
                        *out = -math::exp(logit - max) / sum * inner;
                    }
                    for ((e, w), d) in slots {
                        out[e] += w * d;
                    }
                }
            }
        }
    }
}

impl Score {
    /// The score of a logit that is by itself.
    fn of(self, z: f32) -> f32 {
        match self {
            Self::SqrtSoftplus => softplus(z).sqrt(),
            Self::Sigmoid | Self::Softmax { .. } => math::sigmoid(z),
        }
    }

    /// The derivative of its logarithm.
    fn log_slope(self, z: f32) -> f32 {
        match self {
            // sigmoid / (2 softplus), which goes to 1/2 where both vanish
            Self::SqrtSoftplus if z < -20.0 => 0.5,
            Self::SqrtSoftplus => math::sigmoid(z) / (2.0 * softplus(z)),
            Self::Sigmoid | Self::Softmax { .. } => 1.0 - math::sigmoid(z),
        }
    }
}

impl GroupLimit {
    fn new(groups: &Groups) -> Result<Self> {
        let rank = match groups.score {
            GroupScore::Max => GroupRank::Largest,
            GroupScore::TopTwoSum => GroupRank::TwoLargest,
            other => return Err(Error::Unsupported(format!("ranking of groups by {}", variant(&other)))),
        };
        Ok(Self { count: groups.count, top: groups.top, rank })
    }
}

/// Whether the softmax scores of the selected experts sum to less than `floor`.
fn below_floor(logits: &[f32], selected: &[u32], floor: f32) -> bool {
    if floor <= 0.0 {
        return false;
    }
    let max = largest_logit(logits);
    let sum: f32 = selected.iter().map(|&e| math::exp(logits[e as usize] - max)).sum();
    sum / softmax_sum(logits, max) < floor
}

fn largest_logit(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn softmax_sum(logits: &[f32], max: f32) -> f32 {
    logits.iter().map(|l| math::exp(l - max)).sum()
}

#[cfg(test)]
mod tests;
