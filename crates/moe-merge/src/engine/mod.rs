//! Merging with the model at hand: evidence from runs, layers merged one after the other, parts of experts trained.

mod collect;
mod compact_training;
mod dense;
mod evolution;
mod expert_merging;
mod gradients;
mod overlay;
mod sampler;
mod sequential;

pub use collect::{EvidenceOptions, collect_evidence};
pub use compact_training::{CompactTrained, CompactTraining};
pub use evolution::{Evolved, ExpertEvolution, Fitness};
pub use expert_merging::{Coefficients, ExpertMerging, Granularity, Task};
pub use sequential::{merge_sequentially, merge_sequentially_in_group};
