//! Pruning Mixture-of-Experts checkpoints, from scores to a smaller checkpoint, without running the model.
//!
//! This crate owns what happens between a score table and a pruned checkpoint:
//!
//! - A [`Budget`] says how much of the routed experts is kept, a [`ProtectionMask`] what stays whatever it scores.
//! - An [`Allocator`] distributes the budget over layers and experts; a [`Pruner`] says what goes: [`UnitPruner`] drops FFN
//!   intermediate dimensions inside experts, by expert, layer or model ([`Scope`]); [`ExpertPruner`] drops whole experts.
//! - A [`PrunePlan`] is the result: a versioned JSON file in original indices, made once, applied as often as wanted.
//! - An [`EditSource`] is what a repair changes beside the plan: [`Edits`] in memory or in a file.
//! - [`PrunePlan::apply`] streams checkpoint to checkpoint in one of the [`Export`] modes and gives a [`Report`].
//!
//! How scores are made is none of its business: any unit [`ScoreTable`](moe_checkpoint::ScoreTable) will do.
//!
//! ```no_run
//! use moe_checkpoint::{Checkpoint, ScoreTable};
//! use moe_prune::{ApplyOptions, Budget, Export, ProtectionMask, Pruner, Scope, UnitPruner};
//!
//! let model = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
//! let scores = ScoreTable::load("scores.safetensors")?;
//! let pruner = UnitPruner::new(Scope::Global).min_width(8);
//! let plan = pruner.prune(&scores, model.shape(), Budget::Ratio(0.5), &ProtectionMask::none())?.plan;
//! plan.save("plan.json")?;
//! println!("{}", plan.apply(&model, "out/pruned".as_ref(), &ApplyOptions::new(Export::Ragged))?);
//! # Ok::<(), moe_prune::Error>(())
//! ```

#![deny(missing_docs)]

mod allocators;
mod apply;
mod budget;
mod curves;
mod edits;
mod error;
mod paths;
mod plan;
mod probe;
mod protection;
mod pruners;
mod ranking;
mod report;

pub use allocators::{
    Allocation, AllocationRequest, Allocator, AllocatorConfig, Choice, CurveSource, DepthPrior, Evolution, ExpertId,
    ExpertLimits, Fitness, Global, Hybrid, LayerAllocation, Limits, Normalisation, Normalised, PerLayer, Prior,
    RateDistortion, Rco, Uniform, WidthLimits, knapsack,
};
pub use apply::{
    APPLIED_FILE, Applied, ApplyOptions, Export, FineGrained, LayerPieces, Mtp, OnProgress, Piece, PieceMap, Progress,
    plan_from_masked,
};
#[cfg(feature = "repair")]
pub use apply::{ScaleCalibration, ScaleFit, Trial, TrialOptions};
pub use budget::Budget;
pub use curves::{CURVES_VERSION, Curve, CurvePoint, DistortionCurves};
pub use edits::{EditSizes, EditSource, Edits, EditsFile, ExpertEdit};
pub use error::{Error, Result};
pub use paths::Within;
pub use plan::{LayerKept, PLAN_VERSION, PrunePlan, Ratio};
pub use probe::{Distortion, ModelProbe, NoProbe, Statistic};
pub use protection::{Protected, ProtectionMask, SuperExperts};
pub use pruners::{
    ExpertPruner, NovicePruner, Progressive, PruneRequest, Pruned, Pruner, PrunerConfig, Round, Schedule, Scope,
    SubsetPruner, TwoLevelPruner, UnitPruner, WideExpertPruner,
};
pub use report::{BeforeAfter, LayerReport, Report};
