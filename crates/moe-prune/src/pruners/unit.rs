//! Dropping FFN intermediate dimensions inside routed experts.

use std::fmt;
use std::str::FromStr;

use moe_checkpoint::Granularity;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PruneRequest, Pruner};
use crate::allocators::{Allocator, AllocatorConfig, Global, Limits, PerLayer, Uniform, WidthLimits};
use crate::probe::ModelProbe;
use crate::recipe::tagged;
use crate::{Allocation, Error, Needs, Result};

/// The pool in which units compete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One expert: all keep the same width.
    Expert,
    /// One layer.
    Layer,
    /// The model.
    Global,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expert => "expert",
            Self::Layer => "layer",
            Self::Global => "global",
        })
    }
}

impl FromStr for Scope {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "expert" => Ok(Self::Expert),
            "layer" => Ok(Self::Layer),
            "global" => Ok(Self::Global),
            other => Err(Error::InvalidParameter {
                field: "scope",
                found: format!("`{other}`"),
                expected: "`expert`, `layer` or `global`".into(),
            }),
        }
    }
}

/// Keeps the highest-scored units, as in "Less is MoE" (arXiv 2606.05538): the expert set and the router stay.
///
/// ```
/// use moe_checkpoint::*;
/// use moe_prune::{Budget, ProtectionMask, Pruner, Scope, UnitPruner};
///
/// let layers = vec![MoeLayerShape { layer: 0, widths: vec![2, 2] }];
/// let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers };
/// let scores = ScoreTable {
///     scorer: "{}".into(),
///     granularity: Granularity::Unit,
///     pool: Pool::Global,
///     additive: None,
///     denominator: Denominator::None,
///     layers: vec![LayerScores { layer: 0, scores: vec![vec![0.1, 0.2], vec![0.9, 0.8]], routed: None, whole: None }],
///     provenance: Provenance::new("model", "data", "{}"),
/// };
/// let pruner = UnitPruner::new(Scope::Global);
/// let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none())?.plan;
/// assert_eq!(plan.kept[0].experts, [vec![], vec![0, 1]]);
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitPruner {
    /// How the budget is distributed.
    pub allocator: AllocatorConfig,
    /// Widths allowed.
    #[serde(default)]
    pub limits: WidthLimits,
}

impl UnitPruner {
    /// A pruner of this scope. Scope [`Scope::Expert`] makes widths a multiple of 8, which the grouped matrix products
    /// of stock loaders need in 16-bit types; the others allow any width.
    pub fn new(scope: Scope) -> Self {
        match scope {
            Scope::Expert => Self::with_allocator(AllocatorConfig::Uniform(Uniform::default())).round_to(8),
            Scope::Layer => Self::with_allocator(AllocatorConfig::Layer(PerLayer::default())),
            Scope::Global => Self::with_allocator(AllocatorConfig::Global(Global::default())),
        }
    }

    /// A pruner whose budget is distributed by `allocator`, with any width allowed.
    pub fn with_allocator(allocator: AllocatorConfig) -> Self {
        Self { allocator, limits: WidthLimits::default() }
    }

    /// Makes every width a multiple of `multiple`. The budget is met to the unit where multiples allow it; otherwise
    /// the plan reports the difference.
    pub fn round_to(mut self, multiple: usize) -> Self {
        self.limits.round_to = multiple;
        self
    }

    /// Makes no expert narrower than this.
    pub fn min_width(mut self, width: usize) -> Self {
        self.limits.min_width = width;
        self
    }

    /// Refuses a budget that the width multiple does not allow to meet to the unit.
    pub fn exact(mut self, exact: bool) -> Self {
        self.limits.exact = exact;
        self
    }
}

impl Pruner for UnitPruner {
    fn recipe(&self) -> Value {
        tagged("unit", self)
    }

    fn needs(&self) -> Needs {
        self.allocator.needs(Granularity::Unit)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.allocator.allocate_with(&request.with_limits(Limits::Units(self.limits)), probe)
    }
}
