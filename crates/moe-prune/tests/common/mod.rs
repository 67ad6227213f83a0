//! Fixtures and helpers of the tests that read and write checkpoints.

#[path = "../../../moe-checkpoint/tests/common/checkpoints.rs"]
mod checkpoints;

#[allow(unused_imports)]
pub use checkpoints::{contents, every_checkpoint, files, fuse, magnitude, parity, tiny_moe, unrun};
use moe_checkpoint::Checkpoint;
use moe_prune::{Budget, ProtectionMask, PrunePlan, Pruner, Scope, UnitPruner};

/// A magnitude plan.
pub fn plan(checkpoint: &Checkpoint, scope: Scope, ratio: f64) -> PrunePlan {
    let scores = magnitude(checkpoint);
    let pruner = UnitPruner::new(scope);
    pruner.prune(&scores, checkpoint.shape(), Budget::Ratio(ratio), &ProtectionMask::none()).unwrap().plan
}
