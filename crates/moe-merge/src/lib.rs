//! Merging the experts of Mixture-of-Experts checkpoints. Without feature `engine`, without running the model.
//!
//! A merge is four exchangeable parts, each a trait with implementations that are JSON tagged by `type`:
//!
//! - [`Grouping`]: which experts become one, within a [`GroupBudget`];
//! - [`Alignment`]: which unit of one expert stands for which of another;
//! - [`Combination`]: how the experts of a group become one;
//! - [`RouterRule`]: what becomes of the router.
//!
//! A [`Recipe`] puts them together; the published methods have [names](Recipe::named). With [`Evidence`] of a model,
//! what statistics and sampled tokens say, a recipe gives a [`MergePlan`]: a versioned JSON file in original indices,
//! made once, applied as often as wanted. [`MergePlan::on`] gives the merged model in one of the [`OutputForm`]s, to be
//! run or [written](moe_checkpoint::write()), and a [`MergeReport`].
//!
//! | recipe | groups | units matched by | combined by | router | source |
//! |---|---|---|---|---|---|
//! | `m-smoe` | dominants by usage over the whole model, joined by likeness of router logits | weights | usage | kept | arXiv 2310.01334 |
//! | `mc-smoe` | the same | weights | usage, then low rank and sparse rows ([`Compression`]) | kept | arXiv 2310.01334 |
//! | `hc-smoe` | average linkage of mean outputs over all tokens | – | usage | kept | arXiv 2410.08589 |
//! | `ream`, `ream-square` | at most 16 around the most salient, by gated outputs and router logits | activations and weights | saliency (gate, or gate squared) | deleted | arXiv 2604.04356 |
//! | `sub-moe` | k-means++ of mean outputs, pairs of layers share | – | usage, in a shared subspace | kept | arXiv 2506.23266 |
//! | `mergemoe` | dominants by usage, joined by likeness of gate and up | – | usage; down by least squares | kept | arXiv 2510.14436 |
//! | `dern` | the most routed to stay | – | segments of the others, k-means | deleted | arXiv 2509.10377 |
//! | `uncurl` | spectral clustering of router logits | weights | usage | merged | UNCURL |
//! | `dominant-only` | the most salient stay | – | nothing of the others: expert pruning by REAP, to compare with | deleted | arXiv 2510.13999 |
//!
//! Super experts are [protected](moe_checkpoint::ProtectionMask): they absorb nobody and nobody absorbs them.
//!
//! Beside that: [`Sparsity`] of experts (MoE-Pruner, arXiv 2410.12013), [`Compression`] of experts into `L R + S`,
//! several fine-tuned checkpoints of one base in one ([`TaskRuleConfig`]: task arithmetic, TIES, DARE), and with
//! feature `engine` the parts of a compression trained (`CompactTraining`) and coefficients of task vectors learnt on
//! unlabeled data (`ExpertMerging`).
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use moe_checkpoint::{Checkpoint, ProtectionMask, WriteOptions, write};
//! use moe_merge::{Amount, Evidence, MergeOptions, OutputForm, Recipe};
//!
//! let model = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
//! let recipe = Recipe::named("hc-smoe")?.with_amount(Amount::Ratio(0.25));
//! recipe.check(&model, OutputForm::Grouped, None)?;
//! let evidence = Arc::new(Evidence::load("evidence.safetensors")?);
//! let plan = recipe.plan(&model, &evidence, &ProtectionMask::none())?;
//! let options = MergeOptions { evidence: Some(evidence), ..MergeOptions::new(OutputForm::Grouped) };
//! let merged = plan.on(&model, &options)?;
//! println!("{}", merged.report());
//! write(merged.model(), "out/merged", &WriteOptions::default())?;
//! # Ok::<(), moe_merge::Error>(())
//! ```
//!
//! # Features
#![doc = document_features::document_features!()]
#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod alignment;
mod budget;
mod combination;
mod compress;
mod context;
#[cfg(feature = "engine")]
mod engine;
mod error;
mod evidence;
mod expert_map;
mod experts;
mod grouping;
mod importance;
mod in_place;
mod linalg;
mod merged;
mod plan;
mod planner;
mod recipe;
mod report;
mod router;
mod similarity;
mod sparse;
mod tasks;
#[cfg(test)]
mod testing;
mod upcycle;

pub use alignment::{
    ActivationMatching, Alignment, AlignmentConfig, AlignmentContext, PcaMatching, UnitBasis, WeightMatching, assign,
};
pub use budget::{Amount, GroupBudget, Scope};
pub use combination::{
    Average, Centers, Combination, CombinationConfig, DominantOnly, FitTarget, GroupSink, GroupWeights, LayerJob,
    LeastSquaresDown, Merged, Reference, Scale, SegmentSimilarity, Segments, Subspace, SubspaceRank, Zeros,
};
pub use compress::{
    COMPACT_FILE, CompactExpert, CompactModel, CompactReport, CompactedModel, Compression, LowRankSparse, Ranks,
    RowScore,
};
pub use context::{Gram, LayerContext};
#[cfg(feature = "engine")]
pub use engine::{
    Coefficients, CompactTrained, CompactTraining, EvidenceOptions, Evolved, ExpertEvolution, ExpertMerging, Fitness,
    Granularity, Task, collect_evidence, merge_sequentially, merge_sequentially_in_group,
};
pub use error::{Error, Result};
pub use evidence::{Evidence, LayerEvidence, OutputMean, SCORE, TokenSample};
pub use expert_map::{EXPERT_MAP, ExpertMap, LayerMap};
pub use experts::{ExpertSource, LayerExperts};
pub use grouping::{
    CappedCentroids, Dominant, Grouping, GroupingConfig, Groups, Hierarchical, KMeans, Linkage, Members, OwnGrouping,
    Retain, Spectral,
};
pub use importance::Importance;
pub use in_place::LeftAtBase;
pub use merged::{MergeOptions, MergeRecord, MergedModel, MergedWeights, OutputForm};
pub use plan::{Group, LayerPlan, MERGE_PLAN_VERSION, MergePlan};
pub use recipe::Recipe;
pub use report::{LayerMergeReport, MergeReport};
pub use router::{Delete, Keep, MergeRows, RouterAddition, RouterConfig, RouterMix, RouterRule};
pub use similarity::{Features, Metric, Similarity, Term, WeightParts};
pub use sparse::{INPUT_SQUARES, SPARSE, Sparse, SparseReport, Sparsity, UNIT_SQUARES};
pub use tasks::{Dare, DareThen, MergedTasks, TaskArithmetic, TaskRecord, TaskReport, TaskRule, TaskRuleConfig, Ties};
pub use upcycle::{
    ClusterBy, PartScale, RouterStart, UpcycleInputs, UpcycleMethod, UpcycleReport, UpcycledModel, Upcycling,
};
