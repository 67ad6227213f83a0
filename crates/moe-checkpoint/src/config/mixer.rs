//! What looks at other tokens in a decoder layer.

use super::rope::RopeConfig;

/// What looks at other tokens in a decoder layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mixer {
    /// [`ModelConfig::attention`](super::ModelConfig::attention).
    Attention,
    /// Gated DeltaNet (arXiv 2412.06464), a linear attention.
    DeltaNet(DeltaNet),
    /// Kimi delta attention (arXiv 2510.26692), a linear attention that forgets by channel.
    ChannelDelta(ChannelDelta),
    /// A gated convolution of every channel by itself.
    ShortConvolution {
        /// Tokens that it sees, the current one included.
        kernel: usize,
    },
    /// A state space layer, Mamba2 (arXiv 2405.21060).
    Mamba(Mamba),
    /// Lightning attention (arXiv 2401.04658), a linear attention whose heads forget at constant rates.
    Lightning(LightningAttention),
    /// Softmax attention whose query heads and output projections are experts of their own.
    HeadMixture(HeadMixture),
    /// Softmax attention to the last keys and to compressed ones of all before.
    Compressed(CompressedAttention),
    /// Nothing: the layer is a feed-forward half alone.
    None,
}

/// Attention of DeepSeek-V4. Queries come from a latent and are divided by their root mean square head by head; one
/// head of keys, normed, is that of the values, too. A query sees the keys of a window and the compressed keys of the
/// groups of tokens that are complete, with a sink per head. The last columns of queries and keys rotate, neighboring
/// ones together, and so do those of the outputs of the heads, the other way round, since values were keys. The output
/// projection is two: one for every group of heads, then one of what they give.
#[derive(Clone, Debug, PartialEq)]
pub struct CompressedAttention {
    /// Query heads.
    pub heads: usize,
    /// Width of a head of queries and of the head of keys.
    pub head_dim: usize,
    /// Columns of a head that rotate, the last ones.
    pub rotary_dim: usize,
    /// Rank of the latent of queries.
    pub query_rank: usize,
    /// Groups of heads, which have an output projection each; divides `heads`.
    pub output_groups: usize,
    /// What each of these gives.
    pub output_rank: usize,
    /// Tokens that a query sees the keys of, itself included.
    pub window: usize,
    /// Rotary position embedding of queries and of all keys.
    pub rope: RopeConfig,
    /// How keys are compressed; a layer without sees its window alone.
    pub compression: Option<KeyCompression>,
}

/// Compressed keys: every `rate` tokens become one, a mean of theirs that is weighted column by column by the softmax
/// of a second projection plus a bias for each place, then normed and rotated by the position of its first token.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyCompression {
    /// Tokens of a group.
    pub rate: usize,
    /// Where a query sees few of the compressed keys, what chooses them. Tokens are projected to two keys then, and a
    /// compressed one is the mean of the second ones of its group and the first ones of the group before.
    pub indexer: Option<CompressedIndexer>,
}

impl KeyCompression {
    /// Keys that a token is projected to.
    pub fn series(&self) -> usize {
        if self.indexer.is_some() { 2 } else { 1 }
    }
}

/// An indexer over compressed keys of its own: a query sees the `keys` entries with the largest
/// `sum over heads of w_h relu(q_h . k)`, the queries made from the latent of queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompressedIndexer {
    /// Most compressed keys that a query sees.
    pub keys: usize,
    /// Heads of its queries.
    pub heads: usize,
    /// Width of its queries and keys, of which the last columns rotate.
    pub head_dim: usize,
}

impl CompressedAttention {
    /// Columns of all queries.
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// Mixture of attention heads (arXiv 2210.05144): every expert has query heads, as many as there are heads of keys and
/// values, which all experts share, and an output projection. The experts of a token are chosen as those of its
/// feed-forward half are, by a router of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadMixture {
    /// Number of experts.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Heads of keys and values, and query heads of an expert.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl HeadMixture {
    /// Columns of keys, of values, and of the queries of an expert.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Lightning attention. Head `h` of `heads`, from 0, forgets by `e^{-r}` per token, `r = 2^{-8 (h + 1) / heads}` times
/// the layer's factor, unless the weights say otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct LightningAttention {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head of queries, keys and values.
    pub head_dim: usize,
    /// Factor on the rates.
    pub factor: f64,
}

impl LightningAttention {
    /// Columns of queries, of keys, and of values.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The rate of every head.
    pub fn rates(&self) -> Vec<f64> {
        let base = 2f64.powf(-8.0 / self.heads as f64);
        (1..=self.heads).map(|head| base.powi(head as i32) * self.factor).collect()
    }
}

/// A state space layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of heads that share what writes and reads the state; divides `heads`.
    pub groups: usize,
    /// Width of the state.
    pub state: usize,
    /// Tokens that the convolution in front sees, the current one included.
    pub kernel: usize,
    /// Whether that has a bias.
    pub convolution_bias: bool,
    /// Least step.
    pub least_step: f64,
}

impl Mamba {
    /// Width of all heads.
    pub fn values(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution.
    pub fn channels(&self) -> usize {
        self.values() + 2 * self.groups * self.state
    }
}

/// Kimi delta attention.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelDelta {
    /// Heads of queries, keys and values.
    pub heads: usize,
    /// Width of a head of any of them.
    pub head_dim: usize,
    /// Tokens that the convolutions in front see, the current one included.
    pub kernel: usize,
    /// Whether the projections of decays and gates go through one of the width of a head.
    pub low_rank: bool,
    /// Least logarithm of a decay, where decays are `e^{bound * sigmoid(..)}`; else they are `e^{-rate *
    /// softplus(..)}`.
    pub lower_bound: Option<f64>,
}

impl ChannelDelta {
    /// Width of all queries, and of all keys and values.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// Gated DeltaNet.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a query or key head.
    pub key_head_dim: usize,
    /// Width of a value head.
    pub value_head_dim: usize,
    /// Tokens that the convolution in front sees, the current one included.
    pub kernel: usize,
    /// Whether files have two projections, ordered by key heads, instead of four.
    pub grouped: bool,
}

impl DeltaNet {
    /// Width of all queries, and of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_head_dim
    }

    /// Width of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_head_dim
    }

    /// Channels of the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }
}
