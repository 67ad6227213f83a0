//! Dropping whole routed experts with their rows of the router.

use moe_checkpoint::{Granularity, Routing};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PruneRequest, Pruner};
use crate::allocators::{Allocator, AllocatorConfig, ExpertLimits, Limits, Uniform};
use crate::probe::ModelProbe;
use crate::recipe::tagged;
use crate::{Allocation, Needs, Result};

/// Keeps the highest-scored experts.
///
/// By default as many in each layer, so that stock loaders read the result: a config has one number of experts. Another
/// allocator may give every layer a number of its own, which the ragged format holds and a uniform export refuses.
///
/// The table must score experts; unit scores become expert scores by
/// [`ScoreTable::to_experts`](moe_checkpoint::ScoreTable::to_experts).
///
/// ```
/// use moe_checkpoint::*;
/// use moe_prune::{Budget, ExpertPruner, ProtectionMask, Pruner};
///
/// let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![MoeLayerShape { layer: 0, widths: vec![2; 4] }] };
/// let scores = vec![vec![0.1], vec![0.4], vec![0.3], vec![0.2]];
/// let scores = ScoreTable {
///     scorer: "{}".into(),
///     granularity: Granularity::Expert,
///     pool: Pool::Layer,
///     additive: None,
///     denominator: Denominator::None,
///     layers: vec![LayerScores { layer: 0, scores, routed: None, whole: None }],
///     provenance: Provenance::new("model", "data", "{}"),
/// };
/// let plan = ExpertPruner::new().prune(&scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none())?.plan;
/// assert_eq!(plan.kept[0].removed, [0, 3]);
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertPruner {
    /// How the budget is distributed.
    pub allocator: AllocatorConfig,
    /// Groups of neighboring experts that lose as many each; 1 unless the router selects groups first
    /// ([`Routing::groups`]).
    pub groups: usize,
    /// No layer keeps fewer experts; see [`ExpertLimits::min_experts`].
    pub min_experts: usize,
    /// Every layer keeps a multiple of this many experts; see [`ExpertLimits::multiple_of`].
    pub multiple_of: usize,
}

impl Default for ExpertPruner {
    fn default() -> Self {
        Self { allocator: AllocatorConfig::Uniform(Uniform::default()), groups: 1, min_experts: 0, multiple_of: 1 }
    }
}

impl ExpertPruner {
    /// A pruner for routers without groups that keeps as many experts in each layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pruner for routers without groups whose budget is distributed by `allocator`.
    pub fn with_allocator(allocator: AllocatorConfig) -> Self {
        Self { allocator, ..Self::default() }
    }

    /// Makes every one of this many groups lose as many experts.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// Keeps at least this many experts in every layer.
    pub fn min_experts(mut self, experts: usize) -> Self {
        self.min_experts = experts;
        self
    }

    /// Makes every layer keep a multiple of this many experts, for expert-parallel serving on as many devices.
    pub fn multiple_of(mut self, multiple: usize) -> Self {
        self.multiple_of = multiple;
        self
    }

    /// Keeps what this routing needs; see [`ExpertLimits::for_routing`].
    pub fn for_routing(self, routing: &Routing) -> Self {
        let ExpertLimits { groups, min_experts, .. } = ExpertLimits::for_routing(routing);
        self.groups(groups).min_experts(min_experts)
    }

    pub(super) fn limits(&self) -> Limits {
        let Self { groups, min_experts, multiple_of, .. } = *self;
        Limits::Experts(ExpertLimits { groups, min_experts, multiple_of, keeps_router: false })
    }
}

impl Pruner for ExpertPruner {
    fn recipe(&self) -> Value {
        tagged("expert", self)
    }

    fn needs(&self) -> Needs {
        self.allocator.needs(Granularity::Expert)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.allocator.allocate_with(&request.with_limits(self.limits()), probe)
    }
}
