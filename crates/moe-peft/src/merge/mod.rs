//! Adapters merged into a checkpoint, streamed, and into each other.

mod apply;
mod combine;

pub use apply::{AppliedMap, MERGED_FILE, MergeOptions, MergeReport, merge, write_residual};
pub use combine::{Combination, combine};
