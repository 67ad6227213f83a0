//! The step that replaces the matrices of experts by low-rank ones.

use moe_merge::{Compression, Ranks, RowScore};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Replaces the matrices of routed experts by products of low rank, and a few rows of what these leave: the second half
/// of MoE-I² (arXiv 2411.01016), and of MC-SMoE (arXiv 2310.01334) without its merging. The factors are an artifact of
/// the run, `steps/decompose-…/compact`; the model that goes on, and is written, has the matrices formed, so that stock
/// loaders read it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Decompose {
    /// Rank of every matrix; the mean of the ranks where these differ.
    pub rank: usize,
    /// `same`, or `importance`: in proportion to the Fisher scores of the experts on the rows of calibration.
    #[serde(default)]
    #[schemars(with = "String")]
    pub ranks: Ranks,
    /// Share of the rows of what is left over that are kept, over all matrices together.
    #[serde(default)]
    pub keep_rows: f64,
    /// What rows are ranked by: `magnitude`, or `fisher`, which looks at the rows of calibration.
    #[serde(default)]
    #[schemars(with = "String")]
    pub rows: RowScore,
}

impl Decompose {
    /// What is done to the experts.
    pub fn compression(&self) -> Compression {
        Compression { rank: self.rank, keep_rows: self.keep_rows, rows: self.rows, ranks: self.ranks }
    }
}
