//! What goes: from scores and a budget to a [`PrunePlan`].

mod expert;
mod unit;

use moe_checkpoint::{MoeShape, ScoreTable};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use expert::ExpertPruner;
pub use unit::{Scope, UnitPruner};

use crate::{Allocation, Budget, ProtectionMask, PrunePlan, Result};

/// Decides what of a model goes.
pub trait Pruner {
    /// How much every expert keeps.
    ///
    /// # Errors
    /// See [`Allocator::allocate`](crate::Allocator::allocate).
    fn allocate(
        &self,
        scores: &ScoreTable,
        shape: &MoeShape,
        budget: Budget,
        protect: &ProtectionMask,
    ) -> Result<Allocation>;

    /// The plan that carries out an allocation.
    ///
    /// # Errors
    /// Scores or an allocation that do not fit the shape.
    fn plan(&self, scores: &ScoreTable, allocation: &Allocation, shape: &MoeShape) -> Result<PrunePlan>;

    /// [`Pruner::allocate`], then [`Pruner::plan`].
    ///
    /// # Errors
    /// Those of both.
    fn prune(&self, scores: &ScoreTable, shape: &MoeShape, budget: Budget, protect: &ProtectionMask) -> Result<Pruned> {
        let allocation = self.allocate(scores, shape, budget, protect)?;
        let plan = self.plan(scores, &allocation, shape)?;
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
}

impl Pruner for PrunerConfig {
    fn allocate(
        &self,
        scores: &ScoreTable,
        shape: &MoeShape,
        budget: Budget,
        protect: &ProtectionMask,
    ) -> Result<Allocation> {
        match self {
            Self::Unit(pruner) => pruner.allocate(scores, shape, budget, protect),
            Self::Expert(pruner) => pruner.allocate(scores, shape, budget, protect),
        }
    }

    fn plan(&self, scores: &ScoreTable, allocation: &Allocation, shape: &MoeShape) -> Result<PrunePlan> {
        match self {
            Self::Unit(pruner) => pruner.plan(scores, allocation, shape),
            Self::Expert(pruner) => pruner.plan(scores, allocation, shape),
        }
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
