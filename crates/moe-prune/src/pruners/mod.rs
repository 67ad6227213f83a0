//! What goes: from scores and a budget to a [`PrunePlan`].

mod config;
mod expert;
mod genetic;
mod novice;
mod progressive;
mod subset;
mod two_level;
mod unit;
mod wide;

use moe_checkpoint::{ExpertId, Granularity, MoeShape, Pool, ProtectionMask, Ratio, ScoreTable};
use serde_json::{Value, json};

pub use config::{OwnPruner, PrunerConfig};
pub use expert::ExpertPruner;
pub use genetic::GeneticPruner;
pub use novice::NovicePruner;
pub use progressive::{Progressive, Round, Schedule};
pub use subset::SubsetPruner;
pub use two_level::TwoLevelPruner;
pub use unit::{Scope, UnitPruner};
pub use wide::WideExpertPruner;

use crate::allocators::{AllocationRequest, LayerAllocation, Limits, sum_of_layers};
use crate::plan::{LayerKept, PLAN_VERSION};
use crate::probe::{ModelProbe, NoProbe};
use crate::{Allocation, Budget, Error, Needs, PrunePlan, Result};

/// What a pruner works on.
#[derive(Clone, Copy, Debug)]
pub struct PruneRequest<'a> {
    /// Scores that decide.
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

    /// The allocation that keeps this, all MoE layers in order, for an allocator or pruner with this recipe. What it
    /// drops is counted, its distortion predicted as the sum of the scores that go, if those add up.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] for layers, experts or units that the model does not have, for protected units that would
    /// go, and for units that an earlier round dropped.
    pub fn allocation(&self, allocator: Value, kept: Vec<LayerKept>) -> Result<Allocation> {
        let (shape, scores) = (self.shape, self.scores);
        scores.validate_for(shape)?;
        self.protect.validate(shape)?;
        let mut layers = Vec::with_capacity(kept.len());
        let (mut plan, all) = (PrunePlan::keep_all(shape, ""), shape.units());
        plan.kept = kept;
        plan.ratio.achieved = (all - plan.units_kept().min(all)) as f64 / all.max(1) as f64;
        plan.validate(shape)?;
        for ((position, kept), (widths, scores)) in
            plan.kept.iter().enumerate().zip(shape.layers.iter().map(|l| &l.widths).zip(&scores.layers))
        {
            let mut predicted = 0.0;
            for (expert, (units, width)) in kept.experts.iter().zip(widths).enumerate() {
                let id = ExpertId { layer: kept.layer, expert };
                let before = self.gone.map(|gone| &gone[position].experts[expert]);
                if let Some(unit) = units.iter().find(|unit| before.is_some_and(|b| b.binary_search(unit).is_err())) {
                    return Err(Error::invalid_plan(format!("{id}: unit {unit} went in an earlier round")));
                }
                let dropped = (0..*width as u32).filter(|unit| units.binary_search(unit).is_err());
                for unit in dropped.filter(|unit| before.is_none_or(|b| b.binary_search(unit).is_ok())) {
                    if self.protect.is_protected(id.layer, id.expert, unit) {
                        return Err(Error::invalid_plan(format!("{id}: unit {unit} is protected, but would go")));
                    }
                    if self.scores.granularity == Granularity::Unit {
                        predicted += f64::from(scores.scores[expert][unit as usize]);
                    }
                }
                if self.scores.granularity == Granularity::Expert && units.is_empty() {
                    predicted += f64::from(scores.scores[expert][0]);
                }
            }
            layers.push(LayerAllocation {
                layer: kept.layer,
                kept: kept.experts.clone(),
                removed: kept.removed.clone(),
                predicted: self.scores.adds_up(Pool::Layer).then_some(predicted),
            });
        }
        let kept = plan.units_kept();
        Ok(Allocation {
            allocator,
            budget: self.budget,
            predicted: sum_of_layers(scores, &layers),
            measured: None,
            layers,
            asked_dropped: all - self.budget.kept_units(shape),
            dropped: all - kept,
            cost: kept as u64 * shape.parameters_per_unit() as u64,
            protected: self.protect.clone(),
            floor_hits: Vec::new(),
            seed: None,
            notes: Vec::new(),
        })
    }

    /// The request that an allocator gets.
    pub fn with_limits(&self, limits: Limits) -> AllocationRequest<'a> {
        let Self { scores, shape, budget, protect, gone } = *self;
        AllocationRequest { scores, shape, budget, protect, limits, gone }
    }
}

/// Decides what of a model goes.
///
/// One of your own needs three functions; [`PruneRequest::allocation`] makes an [`Allocation`] of what it keeps:
///
/// ```
/// use moe_checkpoint::{Granularity, Pool};
/// use moe_prune::{Allocation, LayerKept, ModelProbe, Needs, PruneRequest, Pruner, Result};
/// use serde_json::{Value, json};
///
/// /// Keeps the first half of every expert, whatever it scores.
/// struct FirstHalf;
///
/// impl Pruner for FirstHalf {
///     fn recipe(&self) -> Value {
///         json!({ "type": "first_half" })
///     }
///
///     fn needs(&self) -> Needs {
///         Needs::new(Granularity::Unit, Pool::Expert)
///     }
///
///     fn allocate_with(&self, request: &PruneRequest<'_>, _: &mut dyn ModelProbe) -> Result<Allocation> {
///         let half = |width: &usize| (0..(*width / 2) as u32).collect();
///         let layers = request.shape.layers.iter();
///         let kept = layers.map(|l| LayerKept::of_units(l.layer, l.widths.iter().map(half).collect()));
///         request.allocation(self.recipe(), kept.collect())
///     }
/// }
/// ```
pub trait Pruner {
    /// The pruner with its parameters, as a plan records it: an object whose `type` names it.
    fn recipe(&self) -> Value;

    /// What it needs of scores and of a model.
    fn needs(&self) -> Needs;

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
        allocation.plan(self.recipe(), scores, shape)
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
        let needs = self.needs();
        needs.check_probe(probe.answers())?;
        needs.check_scores(request.scores)?;
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

impl Allocation {
    /// The plan that carries this out, for a pruner with this recipe.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`](crate::Error::InvalidPlan) if this does not fit the shape.
    pub fn plan(&self, pruner: Value, scores: &ScoreTable, shape: &MoeShape) -> Result<PrunePlan> {
        let units = shape.units().max(1) as f64;
        let asked = match self.budget {
            Budget::Ratio(ratio) => ratio,
            _ => self.asked_dropped as f64 / units,
        };
        // A recipe as JSON; text that is none stays a string.
        let parsed = |recipe: &str| serde_json::from_str(recipe).unwrap_or_else(|_| Value::String(recipe.to_string()));
        let plan = PrunePlan {
            version: PLAN_VERSION,
            model: scores.provenance.model.clone(),
            shape: shape.clone(),
            ratio: Ratio { asked, achieved: self.dropped as f64 / units },
            recipe: json!({
                "pruner": pruner,
                "budget": self.budget,
                "protected": self.protected,
                "scorer": parsed(&scores.scorer),
                "calibration": { "data": scores.provenance.data, "recipe": parsed(&scores.provenance.recipe) },
            }),
            never_routed: scores.never_routed(),
            kept: self.kept(),
            notes: self.notes.clone(),
        };
        plan.validate(shape)?;
        Ok(plan)
    }

    /// Puts other layers in, and counts anew. Predictions stay.
    fn with_layers(mut self, layers: Vec<LayerAllocation>, shape: &MoeShape) -> Self {
        let kept: usize = layers.iter().map(LayerAllocation::units).sum();
        self.dropped = shape.units() - kept;
        self.cost = kept as u64 * shape.parameters_per_unit() as u64;
        self.layers = layers;
        self
    }
}
