//! Merging with the model at hand: evidence from runs, plans as overlays, layers merged one after the other.

mod collect;
mod dense;
mod overlay;
mod sampler;
mod sequential;

pub use collect::{EvidenceOptions, collect_evidence};
pub use overlay::MergeOverlay;
pub use sequential::merge_sequentially;

pub(crate) use collect::EvidenceCollector;
