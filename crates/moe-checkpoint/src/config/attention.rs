//! Softmax attention.

use super::rope::RopeConfig;

/// Attention of layers with a window, where it is another one than that of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalAttention {
    /// Its heads and projections.
    pub attention: AttentionConfig,
    /// Its rotary position embedding.
    pub rope: RopeConfig,
}

/// Causal attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// What the projections are.
    pub kind: AttentionKind,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`. Equal to it for [`AttentionKind::Latent`].
    pub num_kv_heads: usize,
    /// Width of one query and key head; `qk_nope_head_dim + qk_rope_head_dim` for [`AttentionKind::Latent`].
    pub head_dim: usize,
    /// Dimensions of a head that the rotary embedding turns. The first ones for [`AttentionKind::Grouped`], the last
    /// ones (`qk_rope_head_dim`) for [`AttentionKind::Latent`].
    pub rotary_dim: usize,
    /// Whether query, key and value projections have a bias; for [`AttentionKind::Latent`], the two projections down to
    /// the latents.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// RMSNorm on queries and keys.
    pub qk_norm: QkNorm,
    /// Whether that norm is after the rotary embedding instead of before it.
    pub norm_after_rotation: bool,
    /// RMSNorm without a weight on every value head.
    pub value_norm: bool,
    /// Whether the projection of keys, before their norm, gives the values, too.
    pub tied_values: bool,
    /// Whether one matrix holds the projections of queries, keys and values, its rows in this order.
    pub packed: bool,
    /// Where logits of gates come from, whose sigmoid multiplies the outputs of the heads.
    pub gate: OutputGate,
    /// Indexer that chooses the keys a query sees, where there is one.
    pub selects: Option<KeySelection>,
    /// Growth of queries with their position.
    pub growth: Option<QueryGrowth>,
    /// Bound that queries, keys and values are clamped to, after the norm and before the rotary embedding.
    pub qkv_clip: Option<f64>,
    /// Whether every head has a learnt logit that takes part in the softmax and has no value.
    pub sinks: bool,
    /// Factor on the dot products before the softmax where it is not `1 / sqrt(head_dim)`. The square of YaRN's
    /// `mscale` in DeepSeek models is part of it.
    pub scale: Option<f64>,
}

impl AttentionConfig {
    /// Factor on the dot products before the softmax.
    pub fn softmax_scale(&self) -> f64 {
        self.scale.unwrap_or_else(|| (self.head_dim as f64).powf(-0.5))
    }

    /// Width of one value head.
    pub fn value_head_dim(&self) -> usize {
        match &self.kind {
            AttentionKind::Grouped => self.head_dim,
            AttentionKind::Latent(latent) => latent.v_head_dim,
        }
    }
}

/// An indexer, which chooses the keys that a query sees (DeepSeek Sparse Attention, arXiv 2512.02556): those with the
/// largest `sum over its heads of w_h relu(q_h . k)`, of keys that have one head, and queries made from the latent of
/// queries. A query with no more keys before it sees all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySelection {
    /// Most keys that a query sees.
    pub keys: usize,
    /// Heads of the indexer.
    pub heads: usize,
    /// Width of its queries and keys, of which the first `qk_rope_head_dim` columns are rotated.
    pub head_dim: usize,
    /// Whether neighboring columns are rotated together; otherwise those of both halves.
    pub interleaved: bool,
    /// The layer whose indexer chooses the keys of every decoder layer: itself, or one before it.
    pub chosen_by: Vec<usize>,
}

impl KeySelection {
    /// Whether a decoder layer has an indexer of its own.
    pub fn is_own(&self, layer: usize) -> bool {
        self.chosen_by.get(layer) == Some(&layer)
    }

    /// Whether layers after this one take the keys that it chooses.
    pub fn is_shared(&self, layer: usize) -> bool {
        self.chosen_by.iter().filter(|by| **by == layer).count() > 1
    }
}

/// Where logits of gates on the outputs of heads come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutputGate {
    /// There are none.
    #[default]
    None,
    /// The query projection gives them beside every query head, `[query | gate]` per head.
    Query,
    /// A projection of their own.
    Projection,
    /// A projection of their own that gives one per head.
    Head,
}

/// Growth of queries with their position: the query at position `p`, from 0, is multiplied by
/// `1 + rate * ln(1 + floor((p + offset) / length))`. With [`AttentionKind::Grouped`] it is in layers that do not
/// rotate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    /// Rate of the growth.
    pub rate: f64,
    /// Positions without growth.
    pub length: usize,
    /// Added to the position.
    pub offset: usize,
}

/// What the attention projections are.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum AttentionKind {
    /// Grouped-query attention: one projection each for queries, keys and values.
    Grouped,
    /// Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values come from a low-rank latent.
    Latent(LatentAttention),
}

/// Multi-head latent attention. `kv_a_proj_with_mqa` gives `[kv_lora_rank latent | qk_rope_head_dim rotary key]`; the
/// normed latent goes through `kv_b_proj`, whose rows are per head `[qk_nope_head_dim key | v_head_dim value]`. A query
/// head is `[qk_nope_head_dim | qk_rope_head_dim]`. The rotary key is shared by all heads.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentAttention {
    /// Rank of the latent of queries; `None` for a plain query projection.
    pub q_lora_rank: Option<usize>,
    /// Rank of the latent of keys and values.
    pub kv_lora_rank: usize,
    /// Part of a query or key head without position.
    pub qk_nope_head_dim: usize,
    /// Part of a query or key head that is rotated.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Epsilon of the norms of both latents: transformers leaves it at 1e-6 whatever `rms_norm_eps` says.
    pub norm_eps: f64,
    /// Factor on the normed latent of keys and values.
    pub kv_scale: f64,
}

/// RMSNorm on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QkNorm {
    /// Queries and keys are not normalized.
    None,
    /// Over `head_dim`, one weight `[head_dim]` for all heads.
    Head,
    /// Over `head_dim`, without a weight, in layers that rotate.
    Unit,
    /// Over the whole projection, weights `[heads * head_dim]` and `[kv_heads * head_dim]`.
    Projection,
}
