//! The step that puts zeros into weights.

use moe_merge::Sparsity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Puts zeros into the weights of routed experts, as MoE-Pruner (arXiv 2410.12013) does: the least of every output row
/// by size times the norm of the input, tokens weighed by their routing weight. Shapes stay, so that stock loaders read
/// the outcome.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sparsify {
    /// `{"unstructured": 0.5}` for a fraction of every row, or `{"pattern": {"keep": 2, "of": 4}}`.
    #[schemars(with = "serde_json::Map<String, Value>")]
    pub sparsity: Sparsity,
}
