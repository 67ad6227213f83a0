//! Experts that take so many tokens and drop the rest.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::RunTimeRouting;
use crate::{
    Model,
    error::{Error, Result},
    overlay::{RouterTokens, RoutingRule, RuleGradients},
    router::{Combine, Routed},
};

/// Every expert takes at most C tokens of a group; what is over is dropped, and a token all of whose experts dropped it
/// passes the layer unchanged.
///
/// C makes what becomes of a token depend on its group, later tokens included: generation refuses it, and figures under
/// it belong to a [`group`](Self::group) and to waves of a size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// The capacity factor, above 0.
    pub factor: f64,
    /// How C follows from it.
    #[serde(default)]
    pub formula: CapacityFormula,
    /// Whom an expert that is over its capacity drops.
    #[serde(default)]
    pub policy: DropPolicy,
    /// The tokens that compete.
    #[serde(default)]
    pub group: CapacityGroup,
    /// Whether the weights of the experts that are left are divided by their sum, as GShard does after dropping.
    #[serde(default)]
    pub renormalize: bool,
    /// Keeps the second choice with probability `min(1, w_2 / threshold)`: ST-MoE's code has 0.2. Without, always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_threshold: Option<f64>,
    /// Seed of that choice.
    #[serde(default)]
    pub seed: u64,
}

/// How the capacity of an expert follows from a factor `f`, the T tokens of a group, E experts and k experts per token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapacityFormula {
    /// `ceil(f k T / E)` (Megatron-LM; GShard's `2 T / E` at `f` = 1 with two experts per token).
    #[default]
    Megatron,
    /// `max(4, round(f T / E))`, without k (Switch Transformers in flaxformer).
    Switch,
    /// `max(4, min(T, floor(f T / E)))` (ST-MoE in PyTorch).
    StMoe,
}

/// Whom an expert drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropPolicy {
    /// The tokens with the smallest weights (Megatron's `probs`); the later one of two equal ones.
    #[default]
    Weight,
    /// Second choices before first ones, later tokens before earlier ones (Switch, GShard).
    Position,
    /// Second choices before first ones, tokens whose best expert weighs less before others (batch-prioritized routing,
    /// V-MoE, arXiv 2106.05974).
    BatchPriority,
}

/// The tokens that compete for an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapacityGroup {
    /// Those of a sequence.
    #[default]
    Sequence,
    /// Those of a wave.
    Wave,
}

impl CapacityGroup {
    /// The rows of every group.
    pub(super) fn rows(self, tokens: &RouterTokens<'_>) -> Vec<Range<usize>> {
        match self {
            Self::Sequence => tokens.wave.sequences.iter().map(|sequence| sequence.tokens.clone()).collect(),
            Self::Wave => std::iter::once(0..tokens.tokens()).collect(),
        }
    }
}

impl CapacityFormula {
    /// The most tokens that an expert takes.
    pub fn capacity(self, factor: f64, tokens: usize, experts: usize, top_k: usize) -> usize {
        let (t, e) = (tokens as f64, experts.max(1) as f64);
        match self {
            Self::Megatron => (factor * top_k as f64 * t / e).ceil() as usize,
            Self::Switch => ((factor * t / e).round() as usize).max(4),
            Self::StMoe => tokens.min((factor * t / e) as usize).max(4),
        }
    }
}

#[derive(Debug)]
struct CapacityRule(Capacity);

impl Capacity {
    /// A capacity by this factor with everything else as in Megatron-LM.
    pub fn new(factor: f64) -> Self {
        Self {
            factor,
            formula: CapacityFormula::default(),
            policy: DropPolicy::default(),
            group: CapacityGroup::default(),
            renormalize: false,
            second_threshold: None,
            seed: 0,
        }
    }

    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] names the field that is out of range; [`Error::Unsupported`] for weights that the model's rule
    /// cannot give.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        if !(self.factor > 0.0 && self.factor.is_finite()) {
            return Err(Error::input("factor", self.factor, "a finite number above 0"));
        }
        if let Some(threshold) = self.second_threshold.filter(|t| !(*t > 0.0 && *t <= 1.0)) {
            return Err(Error::input("second_threshold", threshold, "a number in (0, 1]"));
        }
        if self.renormalize {
            model.router().with_combine(Combine::Renorm)?;
        }
        RunTimeRouting::everywhere(model.config(), CapacityRule(self.clone()))
    }

    /// Whether the second choice of a token is kept that weighs `weight`.
    fn keeps_second(&self, tokens: &RouterTokens<'_>, token: usize, weight: f32) -> bool {
        let Some(threshold) = self.second_threshold else { return true };
        let mut hasher = blake3::Hasher::new();
        for part in [self.seed, tokens.wave.id, tokens.layer as u64, token as u64] {
            hasher.update(&part.to_le_bytes());
        }
        let hash = hasher.finalize();
        let bits = hash.as_bytes()[..8].iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        (bits >> 11) as f64 / (1u64 << 53) as f64 * threshold < f64::from(weight)
    }

    /// Whether every slot `[T, k]` is left.
    fn kept(&self, tokens: &RouterTokens<'_>, routed: &Routed) -> Vec<bool> {
        let (experts, k) = (routed.experts, routed.top_k.max(1));
        let mut kept = vec![false; routed.weights.len()];
        for rows in self.group.rows(tokens) {
            let capacity = self.formula.capacity(self.factor, rows.len(), experts, k);
            let weight = |slot: usize| routed.weights[slot];
            let mut slots: Vec<usize> = (rows.start * k..rows.end * k).collect();
            slots.retain(|&slot| slot % k != 1 || self.keeps_second(tokens, slot / k, weight(slot)));
            // whoever comes first takes the place; sorting is stable
            match self.policy {
                DropPolicy::Weight => slots.sort_by(|a, b| weight(*b).total_cmp(&weight(*a))),
                DropPolicy::Position => slots.sort_by_key(|slot| (slot % k, slot / k)),
                DropPolicy::BatchPriority => slots.sort_by(|a, b| {
                    let first = |slot: usize| weight(slot / k * k);
                    (a % k).cmp(&(b % k)).then(first(*b).total_cmp(&first(*a)))
                }),
            }
            let mut taken = vec![0usize; experts];
            for slot in slots {
                let taken = &mut taken[routed.selected[slot] as usize];
                kept[slot] = *taken < capacity;
                *taken += usize::from(kept[slot]);
            }
        }
        kept
    }
}

impl RoutingRule for CapacityRule {
    fn route(&self, tokens: &RouterTokens<'_>) -> Result<Routed> {
        let mut routed = tokens.router.route(tokens.logits, tokens.experts, tokens.bias);
        let kept = self.0.kept(tokens, &routed);
        if self.0.renormalize {
            tokens.router.with_combine(Combine::Renorm)?.weigh_members(tokens.logits, &mut routed, |slot| kept[slot]);
        } else {
            routed.weights.iter_mut().zip(kept).filter(|(_, kept)| !kept).for_each(|(weight, _)| *weight = 0.0);
        }
        Ok(routed)
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> Result<RuleGradients> {
        if self.0.renormalize {
            let router = tokens.router.with_combine(Combine::Renorm)?;
            return Ok(router.members_backward(tokens.logits, routed, d_weights).into());
        }
        // weights of what was dropped are constants, those that stay what they were among all
        let whole = tokens.router.route(tokens.logits, tokens.experts, tokens.bias);
        let d: Vec<f32> =
            d_weights.iter().zip(&routed.weights).map(|(d, w)| if *w == 0.0 { 0.0 } else { *d }).collect();
        Ok(tokens.router.backward(tokens.logits, &whole, &d).into())
    }

    fn is_causal(&self) -> bool {
        false
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn rule(capacity: Capacity) -> impl RoutingRule {
        CapacityRule(capacity)
    }
}
