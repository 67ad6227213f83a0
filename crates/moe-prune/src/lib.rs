//! Pruning plans.

mod allocators;
mod budget;
mod error;
mod plan;
mod protection;
mod pruners;
mod ranking;

pub use allocators::{
    Allocation, AllocationRequest, Allocator, AllocatorConfig, ExpertId, Global, LayerAllocation, PerLayer, Uniform,
    WidthLimits,
};
pub use budget::Budget;
pub use error::{Error, Result};
pub use plan::{LayerKept, PLAN_VERSION, PrunePlan, Ratio};
pub use protection::{Protected, ProtectionMask};
pub use pruners::{Pruned, Pruner, PrunerConfig, Scope, UnitPruner};
