//! What goes: from scores and a budget to a [`PrunePlan`].

mod expert;
mod novice;
mod progressive;
mod subset;
mod two_level;
mod unit;
mod wide;

use moe_checkpoint::{MoeShape, ProtectionMask, Ratio, ScoreTable};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use expert::ExpertPruner;
pub use novice::NovicePruner;
pub use progressive::{Progressive, Round, Schedule};
pub use subset::SubsetPruner;
pub use two_level::TwoLevelPruner;
pub use unit::{Scope, UnitPruner};
pub use wide::WideExpertPruner;

use crate::allocators::{AllocationRequest, LayerAllocation, Limits};
use crate::plan::{LayerKept, PLAN_VERSION};
use crate::probe::{ModelProbe, NoProbe};
use crate::{Allocation, Budget, PrunePlan, Result};

/// What a pruner works on.
#[derive(Clone, Copy, Debug)]
pub struct PruneRequest<'a> {
    /// Scores.
    pub scores: &'a ScoreTable,
    /// Shape of the model.
    pub shape: &'a MoeShape,
    /// How much is kept.
    pub budget: Budget,
    /// What is kept whatever it scores.
    pub protect: &'a ProtectionMask,
    /// What an earlier round left; see [`AllocationRequest::gone`].
    pub gone: Option<&'a [LayerKept]>,
}

impl<'a> PruneRequest<'a> {
    /// A request without earlier rounds.
    pub fn new(scores: &'a ScoreTable, shape: &'a MoeShape, budget: Budget, protect: &'a ProtectionMask) -> Self {
        Self { scores, shape, budget, protect, gone: None }
    }

    /// The request that an allocator gets.
    pub fn with_limits(&self, limits: Limits) -> AllocationRequest<'a> {
        let Self { scores, shape, budget, protect, gone } = *self;
        AllocationRequest { scores, shape, budget, protect, limits, gone }
    }
}

/// Decides what of a model goes.
pub trait Pruner {
    /// The pruner with its parameters, as recipes have it.
    fn config(&self) -> PrunerConfig;

    /// How much every expert keeps, with a model at hand. Pruners and allocators that do not ask the model ignore the
    /// probe.
    ///
    /// # Errors
    /// See [`Allocator::allocate_with`](crate::Allocator::allocate_with).
    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation>;

    /// How much every expert keeps, from scores alone.
    ///
    /// # Errors
    /// See [`Allocator::allocate`](crate::Allocator::allocate).
    fn allocate(
        &self,
        scores: &ScoreTable,
        shape: &MoeShape,
        budget: Budget,
        protect: &ProtectionMask,
    ) -> Result<Allocation> {
        self.allocate_with(&PruneRequest::new(scores, shape, budget, protect), &mut NoProbe)
    }

    /// The plan that carries out an allocation.
    ///
    /// # Errors
    /// Scores or an allocation that do not fit the shape.
    fn plan(&self, scores: &ScoreTable, allocation: &Allocation, shape: &MoeShape) -> Result<PrunePlan> {
        let units = shape.units().max(1) as f64;
        let asked = match allocation.budget {
            Budget::Ratio(ratio) => ratio,
            _ => allocation.asked_dropped as f64 / units,
        };
        let plan = PrunePlan {
            version: PLAN_VERSION,
            model: scores.provenance.model.clone(),
            shape: shape.clone(),
            ratio: Ratio { asked, achieved: allocation.dropped as f64 / units },
            recipe: recipe(&self.config(), allocation, scores),
            never_routed: scores.never_routed(),
            kept: allocation.kept(),
        };
        plan.validate(shape)?;
        Ok(plan)
    }

    /// [`Pruner::allocate`], then [`Pruner::plan`].
    ///
    /// # Errors
    /// Those of both.
    fn prune(&self, scores: &ScoreTable, shape: &MoeShape, budget: Budget, protect: &ProtectionMask) -> Result<Pruned> {
        self.prune_with(&PruneRequest::new(scores, shape, budget, protect), &mut NoProbe)
    }

    /// [`Pruner::allocate_with`], then [`Pruner::plan`].
    ///
    /// # Errors
    /// Those of both.
    fn prune_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Pruned> {
        let allocation = self.allocate_with(request, probe)?;
        let plan = self.plan(request.scores, &allocation, request.shape)?;
        Ok(Pruned { plan, allocation })
    }
}

/// A plan and the allocation behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pruned {
    /// What is kept.
    pub plan: PrunePlan,
    /// How that came about.
    pub allocation: Allocation,
}

/// Every pruner, as a line of a recipe: `{"type": "unit", "allocator": {"type": "global"}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum PrunerConfig {
    /// FFN intermediate dimensions inside experts.
    Unit(UnitPruner),
    /// Whole experts.
    Expert(ExpertPruner),
    /// Whole experts, which the router still chooses.
    Novice(NovicePruner),
    /// Whole experts: the subset whose removal changes the output of its layer least.
    Subset(SubsetPruner),
    /// Whole experts first, then units of the others.
    TwoLevel(TwoLevelPruner),
    /// Units, but for some experts of every layer that stay whole.
    Wide(WideExpertPruner),
}

impl PrunerConfig {
    fn inner(&self) -> &dyn Pruner {
        match self {
            Self::Unit(pruner) => pruner,
            Self::Expert(pruner) => pruner,
            Self::Novice(pruner) => pruner,
            Self::Subset(pruner) => pruner,
            Self::TwoLevel(pruner) => pruner,
            Self::Wide(pruner) => pruner,
        }
    }
}

impl Pruner for PrunerConfig {
    fn config(&self) -> PrunerConfig {
        self.clone()
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.inner().allocate_with(request, probe)
    }
}

/// What a plan records of how it was made.
fn recipe(pruner: &PrunerConfig, allocation: &Allocation, scores: &ScoreTable) -> Value {
    // A recipe as JSON; text that is none stays a string.
    let parsed = |recipe: &str| serde_json::from_str(recipe).unwrap_or_else(|_| Value::String(recipe.to_string()));
    json!({
        "pruner": pruner,
        "budget": allocation.budget,
        "protected": allocation.protected,
        "scorer": parsed(&scores.scorer),
        "calibration": { "data": scores.provenance.data, "recipe": parsed(&scores.provenance.recipe) },
    })
}

impl Allocation {
    /// Puts other layers in, and counts anew. Predictions stay.
    fn with_layers(mut self, layers: Vec<LayerAllocation>, shape: &MoeShape) -> Self {
        let kept: usize = layers.iter().map(LayerAllocation::units).sum();
        self.dropped = shape.units() - kept;
        self.cost = kept as u64 * shape.parameters_per_unit() as u64;
        self.layers = layers;
        self
    }
}
