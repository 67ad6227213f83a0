//! What looks at other tokens in a decoder layer.

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
    /// Nothing: the layer is a feed-forward half alone.
    None,
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
