//! Combination: how the experts of a group become one.

mod average;
mod dominant_only;
mod least_squares;
pub(crate) mod segments;
mod subspace;

use std::sync::OnceLock;

use moe_checkpoint::{Activation, ExpertWeights};
use serde::{Deserialize, Serialize};

pub use average::Average;
pub use dominant_only::DominantOnly;
pub use least_squares::{FitTarget, LeastSquaresDown};
pub use segments::{Centers, Scale, SegmentSimilarity, Segments};
pub use subspace::{Subspace, SubspaceRank};

use crate::alignment::{AlignmentConfig, AlignmentContext, UnitBasis};
use crate::evidence::{LayerEvidence, TokenSample};
use crate::experts::{ExpertSource, check_alike, padded};
use crate::importance::Importance;
use crate::plan::{Group, LayerPlan};
use crate::router::RouterAddition;
use crate::{Error, Result};

/// What becomes of a group.
#[derive(Clone, Debug, PartialEq)]
pub enum Merged {
    /// This expert of the layer, as it is: its bytes are copied.
    Unchanged(usize),
    /// An expert of these weights.
    Changed(Box<ExpertWeights>),
}

/// Takes the groups of a layer, each once, by ascending position.
pub type GroupSink<'a> = &'a mut dyn FnMut(usize, Merged) -> Result<()>;

/// One layer of a plan being carried out.
#[derive(Clone, Copy)]
pub struct LayerJob<'a> {
    /// What becomes of it.
    pub plan: &'a LayerPlan,
    /// Its experts.
    pub experts: &'a dyn ExpertSource,
    /// Sampled tokens.
    pub sample: Option<&'a TokenSample>,
    /// How gate and up become a unit.
    pub activation: Activation,
    /// How units are matched.
    pub alignment: &'a AlignmentConfig,
    /// What units are compared in, found when the first two are.
    pub basis: &'a OnceLock<UnitBasis>,
    /// To whose units the others are matched.
    pub reference: Reference,
}

/// To whose units those of a group are matched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The dominant's.
    #[default]
    Dominant,
    /// Those of the group's member of lowest index (M-SMoE's code).
    First,
}

impl LayerJob<'_> {
    /// Calls `f` with each member of a group, as wide as the widest of them and its units matched, and its weight: by
    /// falling weight, so that sums do not depend on the numbering of the experts. Two experts are in memory at a time.
    fn aligned(&self, group: &Group, f: &mut dyn FnMut(&Member<'_>) -> Result<()>) -> Result<()> {
        let layer = self.plan.layer;
        let mut width = 0;
        for member in &group.members {
            width = width.max(self.experts.width(*member as usize)?);
        }
        let expert_of = |expert: usize| Ok::<_, Error>(padded(self.experts.expert(expert)?, width));
        let reference_index = match self.reference {
            Reference::Dominant => group.dominant as usize,
            Reference::First => group.members.first().map_or(0, |e| *e as usize),
        };
        let reference = expert_of(reference_index)?;
        let (sample, activation, experts, basis) = (self.sample, self.activation, self.experts, self.basis);
        let context = AlignmentContext { sample, activation, layer, experts, basis };
        for (expert, weight) in group.by_weight() {
            if expert == reference_index {
                f(&Member { weight, weights: &reference })?;
                continue;
            }
            let mut weights = expert_of(expert)?;
            check_alike(layer, (reference_index, &reference), (expert, &weights))?;
            let order = if width == 0 { None } else { self.alignment.order(&reference, &weights, &context)? };
            if let Some(order) = order {
                weights = weights.select_units(&order)?;
            }
            f(&Member { weight, weights: &weights })?;
        }
        Ok(())
    }
}

/// A member of a group with its units in the order of the group's reference.
struct Member<'a> {
    weight: f64,
    weights: &'a ExpertWeights,
}

/// Makes one expert of every group of a layer.
pub trait Combination {
    /// Gives every group to `sink`, and says what is added to the router's rows beside their own. Groups of one member
    /// give that member unchanged, unless something of other experts comes in.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`], [`Error::Incompatible`], [`Error::Numerics`], and those of `sink`.
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>>;

    /// What the members of a group are weighted by.
    fn weights(&self) -> GroupWeights;

    /// Whether it looks at sampled tokens.
    fn needs_sample(&self) -> bool {
        false
    }

    /// Whether it takes anything from dissolved experts.
    fn takes_dissolved(&self) -> bool {
        false
    }

    /// Whether it adds anything to router rows.
    fn adds_to_router(&self) -> bool {
        false
    }

    /// Whether what becomes of a group is as wide as its dominant. Otherwise it is as wide as its widest member: units
    /// that the others lack count as zero.
    fn as_wide_as_dominant(&self) -> bool {
        false
    }

    /// Units of what becomes of every group of a layer with experts of these widths.
    fn widths(&self, plan: &LayerPlan, widths: &[usize]) -> Vec<usize> {
        let width = |expert: &u32| widths.get(*expert as usize).copied().unwrap_or_default();
        let of = |group: &Group| match self.as_wide_as_dominant() {
            true => width(&group.dominant),
            false => group.members.iter().map(width).max().unwrap_or_default(),
        };
        plan.groups.iter().map(of).collect()
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    fn validate(&self) -> Result<()>;
}

/// Every combination, as JSON tagged by `type`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum CombinationConfig {
    /// The dominant as it is; the others are lost.
    DominantOnly(DominantOnly),
    /// Weighted average of all matrices.
    Average(Average),
    /// Weighted average in a shared subspace (Sub-MoE).
    Subspace(Subspace),
    /// Weighted average of gate and up, down fitted to outputs (MergeMoE).
    LeastSquaresDown(LeastSquaresDown),
    /// Units of lost experts go to the experts they fit and are clustered there (DERN).
    Segments(Segments),
}

impl CombinationConfig {
    fn combination(&self) -> &dyn Combination {
        match self {
            Self::DominantOnly(combination) => combination,
            Self::Average(combination) => combination,
            Self::Subspace(combination) => combination,
            Self::LeastSquaresDown(combination) => combination,
            Self::Segments(combination) => combination,
        }
    }
}

impl Combination for CombinationConfig {
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        self.combination().combine(job, sink)
    }

    fn weights(&self) -> GroupWeights {
        self.combination().weights()
    }

    fn needs_sample(&self) -> bool {
        self.combination().needs_sample()
    }

    fn takes_dissolved(&self) -> bool {
        self.combination().takes_dissolved()
    }

    fn adds_to_router(&self) -> bool {
        self.combination().adds_to_router()
    }

    fn as_wide_as_dominant(&self) -> bool {
        self.combination().as_wide_as_dominant()
    }

    fn validate(&self) -> Result<()> {
        self.weights().importance.validate()?;
        self.combination().validate()
    }
}

/// What the members of a group are weighted by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupWeights {
    /// In proportion to this.
    #[serde(rename = "by")]
    pub importance: Importance,
    /// What members of no importance weigh.
    #[serde(default)]
    pub zeros: Zeros,
}

/// What members of no importance weigh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Zeros {
    /// Nothing; a group in which nobody has any importance is a plain mean. (M-SMoE's code would make it zero.)
    #[default]
    Mean,
    /// As much as the least important expert of the layer that has any, at most one half (REAM); in a layer without one
    /// a group is a plain mean.
    Floor,
}

impl GroupWeights {
    /// In proportion to `importance`.
    pub fn by(importance: Importance) -> Self {
        Self { importance, zeros: Zeros::Mean }
    }

    /// Weights of the members of a group, which sum to 1.
    pub(crate) fn of(self, members: &[usize], evidence: &LayerEvidence, experts: usize) -> Result<Vec<f64>> {
        if members.len() == 1 {
            return Ok(vec![1.0]);
        }
        let all = self.importance.of(evidence, experts)?;
        let mut weights: Vec<f64> = members.iter().map(|member| all[*member]).collect();
        if self.zeros == Zeros::Floor {
            let least = all.iter().copied().filter(|w| *w > 0.0).fold(f64::INFINITY, f64::min);
            if least.is_finite() {
                weights.iter_mut().filter(|w| **w == 0.0).for_each(|w| *w = least.min(0.5));
            }
        }
        let total: f64 = weights.iter().sum();
        let mean = 1.0 / members.len() as f64;
        weights.iter_mut().for_each(|w| *w = if total > 0.0 { *w / total } else { mean });
        Ok(weights)
    }
}

/// A weighted sum of experts of one shape, in f64.
struct Sum {
    parts: [Vec<f64>; 3],
    biases: [Option<Vec<f64>>; 3],
    width: usize,
    hidden: usize,
}

impl Sum {
    fn new(like: &ExpertWeights) -> Self {
        let zeros = || vec![0.0; like.width * like.hidden];
        let bias = |bias: &Option<Vec<f32>>| bias.as_ref().map(|b| vec![0.0; b.len()]);
        Self {
            parts: [zeros(), zeros(), zeros()],
            biases: [bias(&like.gate_bias), bias(&like.up_bias), bias(&like.down_bias)],
            width: like.width,
            hidden: like.hidden,
        }
    }

    fn add(&mut self, weight: f64, expert: &ExpertWeights) {
        use rayon::prelude::*;
        let add = |into: &mut [f64], from: &[f32]| {
            let pairs = into.par_iter_mut().zip(from).with_min_len(1 << 14);
            pairs.for_each(|(sum, v)| *sum += weight * f64::from(*v));
        };
        for (into, from) in self.parts.iter_mut().zip([&expert.gate, &expert.up, &expert.down]) {
            add(into, from);
        }
        for (into, from) in self.biases.iter_mut().zip([&expert.gate_bias, &expert.up_bias, &expert.down_bias]) {
            if let (Some(into), Some(from)) = (into, from) {
                add(into, from);
            }
        }
    }

    fn finish(self) -> ExpertWeights {
        let round = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|v| v as f32).collect() };
        let ([gate, up, down], [gate_bias, up_bias, down_bias]) = (self.parts, self.biases);
        ExpertWeights {
            gate: round(gate),
            up: round(up),
            down: round(down),
            gate_bias: gate_bias.map(round),
            up_bias: up_bias.map(round),
            down_bias: down_bias.map(round),
            width: self.width,
            hidden: self.hidden,
        }
    }
}

/// The weighted average of a group's aligned members.
fn averaged(job: &LayerJob<'_>, group: &Group) -> Result<ExpertWeights> {
    let mut sum: Option<Sum> = None;
    job.aligned(group, &mut |member| {
        sum.get_or_insert_with(|| Sum::new(member.weights)).add(member.weight, member.weights);
        Ok(())
    })?;
    let sum = sum.ok_or_else(|| Error::invalid_plan(format!("layer {}: a group without members", job.plan.layer)))?;
    Ok(sum.finish())
}

/// Gives groups of one as they are and the others as `merge` makes them.
fn combine_groups(
    job: &LayerJob<'_>,
    sink: GroupSink<'_>,
    mut merge: impl FnMut(&Group) -> Result<ExpertWeights>,
) -> Result<Vec<RouterAddition>> {
    for (position, group) in job.plan.groups.iter().enumerate() {
        let merged = match group.members[..] {
            [alone] => Merged::Unchanged(alone as usize),
            _ => Merged::Changed(Box::new(merge(group)?)),
        };
        sink(position, merged)?;
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests;
