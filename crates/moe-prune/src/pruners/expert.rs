//! Dropping whole routed experts with their rows of the router.

use moe_checkpoint::{Granularity, LayerScores, MoeLayerShape, MoeShape, Pool, ScoreTable};
use serde::{Deserialize, Serialize};

use super::{Pruner, recipe};
use crate::allocators::{AllocatorConfig, ExpertId, LayerAllocation, Uniform};
use crate::plan::{LayerKept, PLAN_VERSION, PrunePlan, Ratio};
use crate::{Allocation, Budget, Error, ProtectionMask, Result};

/// Keeps the highest-scored experts of every layer, as many in each layer, so that stock loaders read the result: a config
/// has one number of experts.
///
/// The table must score experts; unit scores become expert scores by
/// [`ScoreTable::to_experts`](moe_checkpoint::ScoreTable::to_experts).
///
/// ```
/// use moe_checkpoint::*;
/// use moe_prune::{Budget, ExpertPruner, ProtectionMask, Pruner};
///
/// let shape = MoeShape { hidden_size: 4, top_k: 1, layers: vec![MoeLayerShape { layer: 0, widths: vec![2; 4] }] };
/// let scores = vec![vec![0.1], vec![0.4], vec![0.3], vec![0.2]];
/// let scores = ScoreTable {
///     scorer: "{}".into(),
///     granularity: Granularity::Expert,
///     pool: Pool::Layer,
///     denominator: Denominator::None,
///     layers: vec![LayerScores { layer: 0, scores, routed: None }],
///     provenance: Provenance::new("model", "data", "{}"),
/// };
/// let plan = ExpertPruner::new().prune(&scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none())?.plan;
/// assert_eq!(plan.kept[0].removed, [0, 3]);
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertPruner {
    /// Groups of neighbouring experts that lose as many each; 1 unless the router selects groups first
    /// ([`Routing::groups`](moe_checkpoint::Routing::groups)).
    pub groups: usize,
}

impl Default for ExpertPruner {
    fn default() -> Self {
        Self { groups: 1 }
    }
}

impl ExpertPruner {
    /// A pruner for routers without groups.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every one of this many groups lose as many experts.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    fn validate(&self, scores: &ScoreTable, shape: &MoeShape) -> Result<()> {
        shape.validate()?;
        scores.validate_for(shape)?;
        if scores.granularity != Granularity::Expert {
            return Err(Error::NeedsExpertScores);
        }
        if !scores.pool.supports(Pool::Layer) {
            return Err(Error::PoolTooNarrow { wanted: Pool::Layer, supported: scores.pool });
        }
        for layer in &shape.layers {
            if self.groups == 0 || layer.num_experts() % self.groups != 0 {
                let expected = format!("a divisor of the {} experts of layer {}", layer.num_experts(), layer.layer);
                return Err(Error::InvalidParameter { field: "groups", found: self.groups.to_string(), expected });
            }
            if let Some(expert) = layer.widths.iter().position(|width| *width == 0) {
                let found = format!("an expert without units (layer {}, expert {expert})", layer.layer);
                return Err(Error::InvalidParameter { field: "shape", found, expected: "experts with units".into() });
            }
        }
        Ok(())
    }

    /// Experts of one layer that stay, ascending.
    fn kept(
        &self,
        scores: &LayerScores,
        shape: &MoeLayerShape,
        count: usize,
        protect: &ProtectionMask,
    ) -> Result<Vec<usize>> {
        let size = shape.num_experts() / self.groups;
        let per_group = count / self.groups;
        let mut kept = Vec::with_capacity(count);
        for group in 0..self.groups {
            let protected = |expert: usize| protect.count(shape.layer, expert, shape.widths[expert]) > 0;
            let mut experts: Vec<usize> = (group * size..(group + 1) * size).collect();
            let floor = experts.iter().filter(|expert| protected(**expert)).count();
            if floor > per_group {
                let what = match self.groups {
                    1 => format!("layer {}", shape.layer),
                    _ => format!("layer {}, group {group}", shape.layer),
                };
                let asked = per_group * shape.widths[experts[0]];
                return Err(Error::Infeasible { what, asked, reason: format!("{floor} experts are protected") });
            }
            // Protected first, then the highest scores; the sort is stable, so that equal ones stay in order.
            experts.sort_by(|a, b| {
                let score = |expert: usize| scores.scores[expert][0];
                protected(*b).cmp(&protected(*a)).then(score(*b).total_cmp(&score(*a)))
            });
            kept.extend(&experts[..per_group]);
        }
        kept.sort_unstable();
        Ok(kept)
    }
}

impl Pruner for ExpertPruner {
    fn allocate(
        &self,
        scores: &ScoreTable,
        shape: &MoeShape,
        budget: Budget,
        protect: &ProtectionMask,
    ) -> Result<Allocation> {
        self.validate(scores, shape)?;
        budget.validate(shape)?;
        protect.validate(shape)?;
        let (units, kept_units) = (shape.units(), budget.kept_units(shape));
        let (mut layers, mut kept_total, mut cost) = (Vec::new(), 0, 0);
        for (scores, shape_of) in scores.layers.iter().zip(&shape.layers) {
            let experts = shape_of.num_experts();
            let proportional = || (experts as u128 * kept_units as u128 / units.max(1) as u128) as usize;
            let count = budget.kept_of_pool(experts).unwrap_or_else(proportional);
            let count = match budget.rounds_up() {
                true => count.next_multiple_of(self.groups),
                false => count - count % self.groups,
            };
            if count < shape.top_k {
                let reason = format!("{count} experts would be left, but the router selects {}", shape.top_k);
                let asked = count * shape_of.widths[0];
                return Err(Error::Infeasible { what: format!("layer {}", shape_of.layer), asked, reason });
            }
            let kept = self.kept(scores, shape_of, count, protect)?;
            let mut layer = LayerAllocation { layer: shape_of.layer, kept: vec![Vec::new(); experts], predicted: 0.0 };
            for (expert, width) in shape_of.widths.iter().enumerate() {
                match kept.binary_search(&expert) {
                    Ok(_) => layer.kept[expert] = (0..*width as u32).collect(),
                    Err(_) => layer.predicted += f64::from(scores.scores[expert][0]),
                }
            }
            kept_total += layer.units();
            cost += layer.units() as u64 * shape.parameters_per_unit() as u64;
            layers.push(layer);
        }
        Ok(Allocation {
            allocator: AllocatorConfig::Uniform(Uniform::default()),
            budget,
            predicted: layers.iter().map(|layer| layer.predicted).sum(),
            layers,
            asked_dropped: units - kept_units,
            dropped: units - kept_total,
            cost,
            protected: protect.clone(),
            floor_hits: Vec::new(),
            seed: None,
        })
    }

    fn plan(&self, scores: &ScoreTable, allocation: &Allocation, shape: &MoeShape) -> Result<PrunePlan> {
        let units = shape.units().max(1) as f64;
        let asked = match allocation.budget {
            Budget::Ratio(ratio) => ratio,
            _ => allocation.asked_dropped as f64 / units,
        };
        let kept = allocation.layers.iter().map(|layer| {
            let experts = layer.kept.iter().enumerate();
            let removed = experts.filter(|(_, kept)| kept.is_empty()).map(|(expert, _)| expert as u32).collect();
            LayerKept { layer: layer.layer, experts: layer.kept.clone(), removed }
        });
        let plan = PrunePlan {
            version: PLAN_VERSION,
            model: scores.provenance.model.clone(),
            shape: shape.clone(),
            ratio: Ratio { asked, achieved: allocation.dropped as f64 / units },
            recipe: recipe(&super::PrunerConfig::Expert(self.clone()), allocation, scores),
            never_routed: ExpertId::never_routed(scores),
            kept: kept.collect(),
        };
        plan.validate(shape)?;
        Ok(plan)
    }
}
