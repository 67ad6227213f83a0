//! Adapters merged into the weights of a model, and into each other.

mod combine;
mod merged;

pub use crate::rewrite::Changes;
pub use combine::{Combination, combine};
pub use merged::{AppliedMap, MERGE, MergeRecipe, Merged};
