//! Whole experts first, then units of the others.

use moe_checkpoint::{ExpertId, Granularity, Reduction};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ExpertPruner, PruneRequest, Pruner, UnitPruner};
use crate::allocators::{Allocator, LayerAllocation};
use crate::plan::{LayerKept, PrunePlan};
use crate::probe::ModelProbe;
use crate::recipe::{reducing, tagged};
use crate::{Allocation, Budget, Error, Needs, Result, Scope};

/// Drops whole experts up to a part of the budget, then units of the experts that are left until the budget is met, as
/// in the order that STUN (arXiv 2409.06211) found best: structure first, then what is finer.
///
/// Takes unit scores. Experts are scored by a reduction of those of their units.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TwoLevelPruner {
    /// Part of what is dropped that goes as whole experts, in (0, 1).
    pub expert_part: f64,
    /// How unit scores become expert scores.
    pub reduction: Reduction,
    /// Which experts go.
    pub experts: ExpertPruner,
    /// Which units of the others go.
    pub units: UnitPruner,
}

impl Default for TwoLevelPruner {
    /// Half as whole experts of the least sum of scores, as many in every layer, half as units of any layer.
    fn default() -> Self {
        Self {
            expert_part: 0.5,
            reduction: Reduction::Sum,
            experts: ExpertPruner::default(),
            units: UnitPruner::new(Scope::Global),
        }
    }
}

impl Pruner for TwoLevelPruner {
    fn recipe(&self) -> Value {
        tagged("two_level", self)
    }

    fn needs(&self) -> Needs {
        let (experts, units) = (self.experts.needs(), self.units.needs());
        let needs = Needs::new(Granularity::Unit, experts.pool.max(units.pool)).asking(experts.probe);
        let needs = if units.wholes { needs.weighing_wholes() } else { needs };
        let sums = [experts.additive, units.additive].into_iter().flatten();
        reducing(sums.fold(needs, |needs, sums| needs.adding(sums.over, sums.what)), self.reduction)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        let PruneRequest { scores, shape, budget, protect, gone } = *request;
        if !(self.expert_part > 0.0 && self.expert_part < 1.0) {
            let found = self.expert_part.to_string();
            let expected = "a number in (0, 1), both ends excluded".into();
            return Err(Error::InvalidParameter { field: "expert_part", found, expected });
        }
        if self.units.needs().probe.any() {
            let found = self.units.allocator.recipe().to_string();
            let expected =
                "an allocator that does not ask the model: nothing probes what the first level leaves".into();
            return Err(Error::InvalidParameter { field: "units.allocator", found, expected });
        }
        if gone.is_some() {
            let found = "what an earlier round left".to_string();
            let expected = "a single round: the levels are rounds already".into();
            return Err(Error::InvalidParameter { field: "gone", found, expected });
        }
        shape.validate()?;
        scores.validate_for(shape)?;
        if scores.granularity != Granularity::Unit {
            return Err(Error::NeedsUnitScores);
        }
        budget.validate(shape)?;
        let asked = shape.units() - budget.kept_units(shape);
        let of_experts = scores.to_experts(self.reduction)?;
        let first_ratio = asked as f64 * self.expert_part / shape.units().max(1) as f64;
        let first = match Budget::Ratio(first_ratio).validate(shape) {
            Ok(()) => {
                let first = PruneRequest { scores: &of_experts, budget: Budget::Ratio(first_ratio), ..*request };
                self.experts.prune_with(&first, probe)?
            }
            // Nothing is asked for: the second level says why.
            Err(_) => return self.units.allocate_with(request, probe),
        };
        // The rest, in the indices of what is left.
        let left = first.plan.pruned_shape();
        let left_scores = first.plan.restrict(scores)?;
        let left_protect = first.plan.reindex(protect);
        let kept = shape.units() - asked;
        if left.units() <= kept {
            return Ok(Allocation { budget, asked_dropped: asked, ..first.allocation });
        }
        // On the side of the whole budget: a ratio bounds what goes. The half keeps the floor where it is.
        let budget_left = match budget {
            Budget::Ratio(_) => Budget::Ratio(((left.units() - kept) as f64 + 0.5) / left.units() as f64),
            _ => Budget::KeepParameters(kept as u64 * shape.parameters_per_unit() as u64),
        };
        let rest = PruneRequest::new(&left_scores, &left, budget_left, &left_protect);
        let second = self.units.prune_with(&rest, &mut crate::NoProbe)?;
        let plan: PrunePlan = first.plan.then(&second.plan)?;
        let layers = plan.kept.iter().zip(first.allocation.layers).zip(&second.allocation.layers);
        let joined = |((kept, first), second): ((&LayerKept, LayerAllocation), &LayerAllocation)| LayerAllocation {
            layer: kept.layer,
            kept: kept.experts.clone(),
            removed: kept.removed.clone(),
            predicted: first.predicted.zip(second.predicted).map(|(experts, units)| experts + units),
        };
        let layers: Vec<LayerAllocation> = layers.map(joined).collect();
        let mut hits = first.allocation.floor_hits;
        for hit in second.allocation.floor_hits {
            let experts = first.plan.layer(hit.layer).map(|layer| layer.experts_kept()).unwrap_or_default();
            hits.push(ExpertId { layer: hit.layer, expert: experts[hit.expert] });
        }
        hits.sort_unstable();
        hits.dedup();
        let notes = [first.allocation.notes, second.allocation.notes].concat();
        let allocation = Allocation {
            budget,
            notes,
            asked_dropped: asked,
            predicted: first.allocation.predicted.zip(second.allocation.predicted).map(|(a, b)| a + b),
            measured: None,
            protected: protect.clone(),
            floor_hits: hits,
            ..second.allocation
        };
        Ok(allocation.with_layers(layers, shape))
    }
}
