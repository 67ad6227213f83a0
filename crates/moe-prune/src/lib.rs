//! Pruning Mixture-of-Experts checkpoints, from scores to a smaller checkpoint. Nothing but feature `repair` runs the
//! model.
//!
//! This crate owns what happens between a score table and a pruned checkpoint:
//!
//! - A [`Budget`] says how much of the routed experts is kept, a [`ProtectionMask`] what stays whatever it scores.
//! - An [`Allocator`] distributes the budget over layers and experts; a [`Pruner`] says what goes: units inside
//!   experts, whole experts, or both. Every pruner takes every allocator; the tables below list them.
//! - A [`ModelProbe`] answers what a candidate would cost. With feature `repair`, `EngineProbe` runs a model under
//!   candidates as overlays (`PlanOverlay`).
//! - A [`PrunePlan`] is the result: a versioned JSON file in original indices, made once, applied as often as wanted.
//! - An [`EditSource`] is what a repair changes beside the plan: [`Edits`] in memory or in a file.
//! - [`PrunePlan::on`] gives the pruned model in one of the forms of [`PruneForm`], and a [`Report`]: a
//!   [`Checkpoint`](moe_checkpoint::Checkpoint) whose weights are made when they are read, to be run, changed further,
//!   or written.
//! - With the feature `repair`, which brings Burn, [`repair`] improves what is left by running the model.
//!
//! How scores are made is none of its business: any [`ScoreTable`](moe_checkpoint::ScoreTable) will do.
//!
//! ```no_run
//! use std::sync::Arc;
//! use moe_checkpoint::{Checkpoint, ScoreTable, WriteOptions, write};
//! use moe_prune::{Budget, ProtectionMask, PruneForm, PruneOptions, Pruner, Scope, UnitPruner};
//!
//! let model = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
//! let options = PruneOptions::new(PruneForm::Ragged);
//! options.check(&model)?; // before scoring, which may take hours
//! let scores = ScoreTable::load("scores.safetensors")?;
//! let pruner = UnitPruner::new(Scope::Global).min_width(8);
//! let plan = pruner.prune(&scores, model.shape(), Budget::Ratio(0.5), &ProtectionMask::none())?.plan;
//! plan.save("plan.json")?;
//! let pruned = plan.on(&model, &options)?;
//! write(pruned.model(), "out/pruned", &WriteOptions::default())?;
//! println!("{}", pruned.report());
//! # Ok::<(), moe_prune::Error>(())
//! ```
//!
//! # Allocators
//!
//! `{"type": ...}` in recipes. All work on units inside experts and on whole experts, but for [`Rco`]. *Comparable
//! over* is the pool that unit scores must support ([`Pool`](moe_checkpoint::Pool)); scores of whole experts are always
//! compared within a layer.
//!
//! | allocator | type | what | comparable over | probe | source |
//! |---|---|---|---|---|---|
//! | [`Uniform`] | `uniform` | the same fraction of every expert; of whole experts, of every layer | expert | | default of most papers; scope E of arXiv 2606.05538 |
//! | [`PerLayer`] | `layer` | the same fraction of every layer, whose experts compete | layer | | scope L |
//! | [`Global`] | `global` | all units or experts of the model compete | model | | scope G |
//! | [`Normalized`] | `normalized` | compete by scores normalized per layer: LAMP, sum, mean, max, coverage | layer | | arXiv 2010.07611, 2606.09886 |
//! | [`Hybrid`] | `hybrid` | a guaranteed share per layer, the rest by global rank | model | | |
//! | [`Coverage`] | `coverage` | the least units that cover a part of the scores of each layer and expert, by their weights as wholes | layer | | MoE-Slimming, ICML 2026 |
//! | [`DepthPrior`] | `depth_prior` | shares by layer weights: a list, linear, trapezoid, ERK, or what a layer does to the model | by [`Within`] | distortion, for importance | MoLA, arXiv 2606.09885, 2411.01016 |
//! | [`RateDistortion`] | `rate_distortion` | the least sum of distortion curves, by dynamic programming | model, or by [`Within`] | measured curves, layer errors | layer-adaptive pruning by rate and distortion |
//! | [`Rco`] | `rco` | gradient search over expert masks | | gradients of gains | arXiv 2605.00649 |
//! | [`Evolution`] | `evolution` | evolution of counts with a fixed order within layers | by [`Within`] | distortion | arXiv 2603.06003 |
//!
//! A ratio never drops more than `floor(N * ratio)` of `N` units and a parameter budget is never exceeded, both within
//! one block (a width multiple, an expert of every group). One thing goes whatever the ratio: what of a width, or of a
//! number of experts, fills no multiple; [`Allocation::notes`] and the plan say so. What cannot be met together with
//! protection and minimum sizes is an error. Ties drop the lower layer, expert and unit first. With experts of
//! different widths, whole experts are the blocks, and one that is too large stays; [`Uniform`] counts experts, not
//! units. No layer is left with fewer experts than the router selects as long as the budget has more for all alike; if
//! it has not, each token gets all that are left ([`TopKClamp`](moe_checkpoint::TopKClamp)).
//!
//! # Pruners
//!
//! | pruner | type | what goes | scores | probe | source |
//! |---|---|---|---|---|---|
//! | [`UnitPruner`] | `unit` | units inside experts | units | | arXiv 2606.05538 |
//! | [`ExpertPruner`] | `expert` | whole experts with their rows of the router; a number per layer is for ragged exports only | experts | | REAP, arXiv 2510.13999 |
//! | [`NovicePruner`] | `novice` | all units of experts that the router goes on choosing | experts | | MoNE, arXiv 2507.00390 |
//! | [`SubsetPruner`] | `subset` | the experts whose removal moves the layer's output least | experts, for counts | layer errors | NAEE, arXiv 2402.14800 |
//! | [`GeneticPruner`] | `genetic` | sets of experts that are evolved for every layer and chosen for neighboring layers together | experts, for counts | layer errors, distortion | MoE-I², arXiv 2411.01016 |
//! | [`TwoLevelPruner`] | `two_level` | whole experts, then units of the others | units | | arXiv 2409.06211 |
//! | [`WideExpertPruner`] | `wide` | units of all but some whole experts per layer | units | | TENP, arXiv 2606.09885 |
//! | [`Progressive`] | | any of them in rounds, scored anew after each | as its pruner | as its pruner | |
//!
//! # Features
#![doc = document_features::document_features!()]
#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod allocators;
mod budget;
#[cfg(feature = "repair")]
mod candidates;
mod curves;
mod edits;
mod error;
mod form;
#[cfg(feature = "repair")]
mod mixed_precision;
mod needs;
mod paths;
mod plan;
mod probe;
mod pruners;
mod ranking;
mod recipe;
#[cfg(feature = "repair")]
pub mod repair;
mod report;

pub use allocators::{
    Allocation, AllocationRequest, Allocator, AllocatorConfig, Choice, Coverage, CurveSource, DepthPrior, Evolution,
    ExpertLimits, Fitness, Global, Hybrid, LayerAllocation, Limits, Normalization, Normalized, OwnAllocator, PerLayer,
    Prior, RateDistortion, Rco, Uniform, WidthLimits, knapsack,
};
pub use budget::Budget;
#[cfg(feature = "repair")]
pub use candidates::Candidate;
pub use curves::{CURVES_VERSION, Curve, CurvePoint, DistortionCurves};
pub use edits::{EditSizes, EditSource, Edits, EditsFile, ExpertEdit};
pub use error::{Error, Result};
pub use form::{
    Export, FineGrained, LayerPieces, PRUNE_METHOD, Piece, PieceMap, PruneForm, PruneOptions, PruneRecord, PrunedModel,
    PrunedPrecision, SharedSets, plan_from_masked,
};
#[cfg(feature = "repair")]
pub use form::{ScaleCalibration, ScaleFit, Trial, TrialOptions};
#[cfg(feature = "repair")]
pub use mixed_precision::{
    MixedPrecision, PrecisionAllocation, PrecisionGroup, PrecisionGroupOptions, PrecisionOption, RoundedExperts,
    Sensitivities, best_allocation,
};
pub use needs::{Needs, Questions, Sums};
pub use paths::Within;
pub use plan::{LayerKept, PLAN_VERSION, PrunePlan};
pub use probe::{Distortion, ModelProbe, NoProbe, Statistic};
#[cfg(feature = "repair")]
pub use probe::{EngineProbe, PlanOverlay, ProbeOptions};
pub use pruners::{
    ExpertPruner, GeneticPruner, NovicePruner, OwnPruner, Progressive, PruneRequest, Pruned, Pruner, PrunerConfig,
    Round, Schedule, Scope, SubsetPruner, TwoLevelPruner, UnitPruner, WideExpertPruner,
};
pub use report::{LayerReport, Report};

#[doc(no_inline)]
pub use moe_checkpoint::{BeforeAfter, ExpertId, Mtp, OnProgress, Progress, ProtectionMask, Ratio};
