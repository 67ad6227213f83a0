//! Units of most experts, while some of every layer stay whole.

use moe_checkpoint::{Granularity, Pool, Reduction};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PruneRequest, Pruner};
use crate::allocators::{Allocator, AllocatorConfig, DepthPrior, ExpertLimits, Limits, Prior, WidthLimits};
use crate::paths::Within;
use crate::probe::ModelProbe;
use crate::recipe::{reducing, tagged};
use crate::{Allocation, Budget, Error, Needs, Result};

/// Keeps some experts at full width and slims the others, as TENP (arXiv 2606.09885) does: more whole experts in deeper
/// layers, a trapezoid over depth. Its exact schedule is not published; the default rises over the first half and
/// stays.
///
/// Takes unit scores; a reduction of them decides which experts stay whole. With the default allocator every layer
/// keeps the same fraction and its slim experts are as wide as each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WideExpertPruner {
    /// Fraction of all experts that stay whole, in [0, 1). TENP keeps 20% to 30% at 40% sparsity and 5% at 70%.
    pub whole: f64,
    /// How these are spread over layers.
    pub depth: Prior,
    /// How unit scores become expert scores.
    pub reduction: Reduction,
    /// How the budget is distributed.
    pub allocator: AllocatorConfig,
    /// Widths allowed.
    pub limits: WidthLimits,
}

impl Default for WideExpertPruner {
    fn default() -> Self {
        let level = Prior::Linear { first: 1.0, last: 1.0 };
        Self {
            whole: 0.2,
            depth: Prior::Trapezoid { edge: 0.5, top: 1.0, rise: 0.5, fall: 1.0 },
            reduction: Reduction::Sum,
            allocator: AllocatorConfig::DepthPrior(DepthPrior { prior: level, within: Within::Even }),
            limits: WidthLimits::default(),
        }
    }
}

impl Pruner for WideExpertPruner {
    fn recipe(&self) -> Value {
        tagged("wide", self)
    }

    fn needs(&self) -> Needs {
        let needs = self.allocator.needs(Granularity::Unit);
        // Which experts stay whole is decided within layers.
        let needs = Needs { pool: needs.pool.max(Pool::Layer), ..needs };
        reducing(needs, self.reduction)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        if !(0.0..1.0).contains(&self.whole) {
            let found = self.whole.to_string();
            let expected = "a number in [0, 1), the end excluded".into();
            return Err(Error::InvalidParameter { field: "whole", found, expected });
        }
        let PruneRequest { scores, shape, .. } = *request;
        shape.validate()?;
        scores.validate_for(shape)?;
        if scores.granularity != Granularity::Unit {
            return Err(Error::NeedsUnitScores);
        }
        request.budget.validate(shape)?;
        let mut protect = request.protect.clone();
        let slim = 1.0 - self.whole;
        let dropped_of_all = Budget::Ratio(slim);
        if dropped_of_all.validate(shape).is_ok() {
            // Which experts stay whole is an allocation of experts by itself, of which nothing is removed.
            let of_experts = scores.to_experts(self.reduction)?;
            let depth = DepthPrior { prior: self.depth.clone(), within: Within::Compete };
            let limits = Limits::Experts(ExpertLimits { keeps_router: true, ..ExpertLimits::default() });
            let of_experts =
                PruneRequest { scores: &of_experts, budget: dropped_of_all, ..*request }.with_limits(limits);
            for layer in depth.allocate(&of_experts)?.layers {
                let whole = layer.kept.iter().enumerate().filter(|(_, kept)| !kept.is_empty());
                whole.for_each(|(expert, _)| protect.protect_expert(layer.layer, expert));
            }
        }
        let inner = PruneRequest { protect: &protect, ..*request };
        let allocation = self.allocator.allocate_with(&inner.with_limits(Limits::Units(self.limits)), probe)?;
        Ok(Allocation { protected: request.protect.clone(), ..allocation })
    }
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Denominator, LayerScores, MoeLayerShape, MoeShape, Pool, Provenance, ScoreTable};

    use super::*;
    use crate::ProtectionMask;

    #[test]
    fn the_best_experts_stay_whole_and_the_others_are_alike() {
        let layers = 3;
        let shape = MoeShape {
            gateless: false,
            hidden_size: 2,
            top_k: 1,
            layers: (0..layers).map(|layer| MoeLayerShape { layer, widths: vec![10; 4] }).collect(),
        };
        let scores = ScoreTable {
            scorer: "{}".into(),
            granularity: Granularity::Unit,
            pool: Pool::Layer,
            additive: Some(Pool::Layer),
            denominator: Denominator::None,
            layers: (0..layers)
                .map(|layer| LayerScores {
                    layer,
                    scores: (0..4).map(|e| (0..10).map(|u| (e * 10 + u) as f32).collect()).collect(),
                    routed: None,
                    whole: None,
                })
                .collect(),
            provenance: Provenance::new("model", "", "{}"),
        };
        let pruner = WideExpertPruner { whole: 0.25, ..WideExpertPruner::default() };
        let none = ProtectionMask::none();
        let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap().plan;
        let widths = |layer: usize| plan.kept[layer].experts.iter().map(Vec::len).collect::<Vec<_>>();
        // 3 of 12 experts, amounts 0.5 : 1 : 1 of 3 experts, so 0.6, 1.2 and 1.2.
        assert_eq!([widths(0), widths(1), widths(2)].map(|w| w.iter().sum::<usize>()), [20, 20, 20]);
        assert_eq!(widths(1), [3, 3, 4, 10]);
        assert_eq!(plan.units_kept(), 60);
        let mut whole: Vec<usize> = (0..layers).map(|l| widths(l).iter().filter(|w| **w == 10).count()).collect();
        whole.sort_unstable();
        assert_eq!(whole.iter().sum::<usize>(), 3);
    }
}
