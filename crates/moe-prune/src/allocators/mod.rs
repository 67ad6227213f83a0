//! How much every layer and expert keeps.
//!
//! An [`Allocator`] turns scores and a [`Budget`] into an [`Allocation`]. The fixed and score-based rules of this module
//! compare raw scores, without normalisation, over one pool: an expert ([`Uniform`]), a layer ([`PerLayer`]) or the
//! model ([`Global`]); see "Selection scope" of Fisher-MoE (arXiv 2606.05538 and its released code).

mod global;
mod layer;
mod uniform;

use std::fmt;

use moe_checkpoint::{Granularity, MoeShape, Pool, ScoreTable};
use serde::{Deserialize, Serialize};

pub use global::Global;
pub use layer::PerLayer;
pub use uniform::Uniform;

use crate::ranking::Ranking;
use crate::{Budget, Error, ProtectionMask, Result};

/// One expert of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExpertId {
    /// Decoder layer index.
    pub layer: usize,
    /// Expert.
    pub expert: usize,
}

impl ExpertId {
    /// Experts that no calibration token was routed to.
    pub(crate) fn never_routed(scores: &ScoreTable) -> Vec<Self> {
        let mut found = Vec::new();
        for layer in &scores.layers {
            for (expert, _) in layer.routed.iter().flatten().enumerate().filter(|(_, count)| **count == 0) {
                found.push(Self { layer: layer.layer, expert });
            }
        }
        found
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}, expert {}", self.layer, self.expert)
    }
}

/// What widths an allocation may give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WidthLimits {
    /// Every width is a multiple of this.
    pub round_to: usize,
    /// No expert becomes narrower than this (one that was narrower keeps its width, if that is a multiple).
    pub min_width: usize,
    /// Refuse rather than miss the budget by the rounding.
    pub exact: bool,
}

impl Default for WidthLimits {
    /// Any width, 0 included.
    fn default() -> Self {
        Self { round_to: 1, min_width: 0, exact: false }
    }
}

/// What an allocator works on.
#[derive(Clone, Copy, Debug)]
pub struct AllocationRequest<'a> {
    /// Unit scores.
    pub scores: &'a ScoreTable,
    /// Shape of the model.
    pub shape: &'a MoeShape,
    /// How much is kept.
    pub budget: Budget,
    /// What is kept whatever it scores.
    pub protect: &'a ProtectionMask,
    /// Widths allowed.
    pub limits: WidthLimits,
}

impl AllocationRequest<'_> {
    /// Checks everything that does not depend on the allocator, and that scores may be compared over `pool`.
    ///
    /// # Errors
    /// A parameter outside its range, a table that is not of this model, has NaN, scores experts, or supports only a
    /// narrower pool; protected units that do not exist.
    pub fn validate(&self, pool: Pool) -> Result<()> {
        self.shape.validate()?;
        self.scores.validate_for(self.shape)?;
        if self.scores.granularity != Granularity::Unit {
            return Err(Error::NeedsUnitScores);
        }
        if !self.scores.pool.supports(pool) {
            return Err(Error::PoolTooNarrow { wanted: pool, supported: self.scores.pool });
        }
        if self.limits.round_to == 0 {
            let expected = "at least 1".to_string();
            return Err(Error::InvalidParameter { field: "round_to", found: "0".into(), expected });
        }
        self.budget.validate(self.shape)?;
        self.protect.validate(self.shape)
    }
}

/// Decides how much every expert keeps.
pub trait Allocator {
    /// Distributes the budget.
    ///
    /// # Errors
    /// Those of [`AllocationRequest::validate`]; [`Error::Infeasible`] if floors need more than the budget leaves, never a
    /// silent clamp; [`Error::Inexact`] if exactness was asked for and the width multiple makes it impossible.
    fn allocate(&self, request: &AllocationRequest<'_>) -> Result<Allocation>;
}

/// Every allocator, as a line of a recipe: `{"type": "global"}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AllocatorConfig {
    /// Every expert drops the same fraction.
    Uniform(Uniform),
    /// Every layer drops the same fraction; its experts compete.
    Layer(PerLayer),
    /// All units of the model compete.
    Global(Global),
}

impl Allocator for AllocatorConfig {
    fn allocate(&self, request: &AllocationRequest<'_>) -> Result<Allocation> {
        match self {
            Self::Uniform(allocator) => allocator.allocate(request),
            Self::Layer(allocator) => allocator.allocate(request),
            Self::Global(allocator) => allocator.allocate(request),
        }
    }
}

/// What an allocator decided, and what it expects of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// The allocator and its parameters.
    pub allocator: AllocatorConfig,
    /// The budget it worked on.
    pub budget: Budget,
    /// MoE layers in ascending order.
    pub layers: Vec<LayerAllocation>,
    /// Units that the budget alone would drop.
    pub asked_dropped: usize,
    /// Units that are dropped.
    pub dropped: usize,
    /// Predicted distortion; for the rules of this module, the sum of the dropped scores.
    pub predicted: f64,
    /// Cost of what is kept, in parameters of routed experts.
    pub cost: u64,
    /// What was protected.
    pub protected: ProtectionMask,
    /// Experts that protection or the minimum width kept from losing more.
    pub floor_hits: Vec<ExpertId>,
    /// Seed of allocators that draw random numbers.
    pub seed: Option<u64>,
}

/// The part of one layer in an [`Allocation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerAllocation {
    /// Decoder layer index.
    pub layer: usize,
    /// Kept unit ids of every expert, ascending.
    pub kept: Vec<Vec<u32>>,
    /// Predicted distortion of this layer.
    pub predicted: f64,
}

impl LayerAllocation {
    /// Kept units of every expert.
    pub fn widths(&self) -> Vec<usize> {
        self.kept.iter().map(Vec::len).collect()
    }

    /// Kept units of the layer.
    pub fn units(&self) -> usize {
        self.kept.iter().map(Vec::len).sum()
    }
}

impl Allocation {
    /// The allocation of given widths: every expert keeps its best units. `widths` is `[MoE layer][expert]`.
    pub(crate) fn of_widths(
        allocator: AllocatorConfig,
        request: &AllocationRequest<'_>,
        rankings: &[Vec<Ranking<'_>>],
        widths: &[Vec<usize>],
        asked_dropped: usize,
        floor_hits: Vec<ExpertId>,
    ) -> Result<Self> {
        let layers: Vec<LayerAllocation> = rankings
            .iter()
            .zip(widths)
            .zip(&request.shape.layers)
            .map(|((experts, widths), layer)| LayerAllocation {
                layer: layer.layer,
                kept: experts.iter().zip(widths).map(|(expert, width)| expert.kept(*width)).collect(),
                predicted: experts.iter().zip(widths).map(|(expert, width)| expert.dropped_score(*width)).sum(),
            })
            .collect();
        let kept: usize = widths.iter().flatten().sum();
        let dropped = request.shape.units() - kept;
        if request.limits.exact && dropped != asked_dropped {
            let round_to = request.limits.round_to;
            return Err(Error::Inexact { asked: asked_dropped, achieved: dropped, round_to });
        }
        Ok(Self {
            allocator,
            budget: request.budget,
            predicted: layers.iter().map(|layer| layer.predicted).sum(),
            layers,
            asked_dropped,
            dropped,
            cost: kept as u64 * request.shape.parameters_per_unit() as u64,
            protected: request.protect.clone(),
            floor_hits,
            seed: None,
        })
    }
}

/// Rounds a number of kept units to a multiple: up for ratios, down for parameter budgets, never above `widest`.
pub(crate) fn round_kept(budget: Budget, kept: usize, round_to: usize, widest: usize) -> usize {
    let rounded = if budget.rounds_up() { kept.next_multiple_of(round_to) } else { kept - kept % round_to };
    rounded.min(widest)
}
