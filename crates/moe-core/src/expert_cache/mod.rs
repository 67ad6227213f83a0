//! Routed experts between memory and disk, where not all fit: in two precisions, loaded ahead by the next layer's
//! router, kept by a policy (HOBBIT, arXiv 2411.01433; EdgeMoE, arXiv 2308.14352).

mod state;
mod stream;

use std::sync::Arc;

use moe_checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

pub use state::{CacheState, ExpertKey, Precision};
pub(crate) use stream::ExpertStream;

/// Which expert goes when another needs its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum EvictionPolicy {
    /// The one whose last use is longest ago.
    #[default]
    Lru,
    /// The one of least priority `w1 R/T + w2 F/T + w3 H/T + w4 (1 - ((l_t - l_i + l_n) mod l_n) / l_n)` (HOBBIT): `R`
    /// the step of its last use, `F` its uses, `H` its uses in high precision, `T` the step, `l_t` its layer, `l_i` the
    /// layer that runs, of `l_n` layers.
    Priority {
        /// Weights of recency, frequency, frequency in high precision, and nearness of its layer.
        weights: [f32; 4],
    },
    /// The one whose layer is farthest ahead, of equal uses; else by uses over that distance (EdgeMoE). A layer that is
    /// done counts as a whole round ahead.
    Distance,
}

impl EvictionPolicy {
    /// Equal weights of everything that HOBBIT looks at.
    pub fn priority() -> Self {
        Self::Priority { weights: [0.25; 4] }
    }
}

/// A second, smaller precision of the same model.
#[derive(Clone, Debug)]
pub struct LowPrecision {
    /// The model in it, such as [`Quantized::model`](moe_checkpoint::Quantized::model) in 4 bits.
    pub model: Arc<Checkpoint>,
    /// An expert is read in high precision where the experts before it, in order of their gate scores, have no more
    /// than this share of a token's scores together (`T1`; HOBBIT 0.6). The first expert always is; at 1 all are.
    pub threshold: f32,
}

/// How experts are cached.
#[derive(Clone, Debug)]
pub struct ExpertCacheOptions {
    /// Bytes of experts in memory at most, as they are stored.
    pub bytes: u64,
    /// Which goes.
    pub policy: EvictionPolicy,
    /// A second precision, if there is one.
    pub low: Option<LowPrecision>,
    /// Whether experts that the next layer's router would choose for what this layer's router reads are loaded while
    /// this layer runs.
    pub prefetch: bool,
    /// An expert is left out of a token's output where the experts before it, in order of their gate scores, have more
    /// than this share of the token's scores together (`T2`; HOBBIT 0.9). The weights of the others stay as they are,
    /// and the first expert always runs. `None` leaves nobody out.
    pub skip: Option<f32>,
}

/// What a cache did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertCacheStatistics {
    /// Experts that were asked for and in memory, a better copy than needed included.
    pub hits: u64,
    /// Experts that had to be read in high precision, and in low.
    pub misses: [u64; 2],
    /// Bytes that were read.
    pub bytes_read: u64,
    /// Experts that were loaded ahead, and how many of them were asked for before they went.
    pub prefetched: u64,
    /// See [`prefetched`](Self::prefetched).
    pub prefetched_used: u64,
    /// Most bytes that were held.
    pub peak_bytes: u64,
    /// Choices of tokens that were left out, each an expert of a token.
    pub skipped: u64,
}

impl ExpertCacheStatistics {
    /// Hits over everything that was asked for.
    pub fn hit_rate(&self) -> f64 {
        let asked = self.hits + self.misses[0] + self.misses[1];
        if asked == 0 { 0.0 } else { self.hits as f64 / asked as f64 }
    }
}

/// What an expert is to a token (HOBBIT, arXiv 2411.01433, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertLevel {
    /// It runs, in this precision.
    Runs(Precision),
    /// It is left out.
    Skipped,
}

/// The levels of a token's experts by their gate scores `[k]`, in the order of these. Scores are normalized to sum to
/// 1 and sorted; an expert is high where those before it have no more than `high` together, skipped where they have
/// more than `skip`, and low between the two. The first expert is high.
pub fn expert_levels(scores: &[f32], high: f32, skip: f32) -> Vec<ExpertLevel> {
    let total: f32 = scores.iter().map(|score| score.max(0.0)).sum();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let (mut levels, mut before) = (vec![ExpertLevel::Runs(Precision::Low); scores.len()], 0.0f32);
    for (rank, at) in order.into_iter().enumerate() {
        let share = if total > 0.0 { before / total } else { 0.0 };
        if rank == 0 || share <= high {
            levels[at] = ExpertLevel::Runs(Precision::High);
        } else if share > skip {
            levels[at] = ExpertLevel::Skipped;
        }
        before += scores[at].max(0.0);
    }
    levels
}
