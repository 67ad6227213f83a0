//! The typed, family-independent view of a `config.json`.
//!
//! The raw JSON is kept beside it ([`Checkpoint::raw_config`](crate::Checkpoint::raw_config)), so that keys unknown to
//! this view survive an edit.

use std::borrow::Cow;

use serde_json::Value;

use crate::experts::ExpertBiases;
use crate::family::family_of;
use crate::formats::Quantization;
use crate::grouped::Grouped;
use crate::ragged::Ragged;
use crate::shape::{MoeLayerShape, MoeShape};
use crate::{Error, Result};

/// What a decoder model is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, e.g. `qwen2_moe`; that of the original model for a ragged checkpoint.
    pub model_type: String,
    /// Width of the residual stream, `H`.
    pub hidden_size: usize,
    /// Rows of the embedding and of the head, `V`.
    pub vocab_size: usize,
    /// Norms before attention, before the FFN and before the head.
    pub norm: NormKind,
    /// Epsilon of those norms, and of the norms of queries and keys of [`AttentionKind::Grouped`].
    pub norm_eps: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the head has a bias `[V]`.
    pub head_bias: bool,
    /// Constant factors on the residual stream; all 1 in most families.
    pub multipliers: Multipliers,
    /// Longest sequence the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Activation of the gate of every FFN.
    pub hidden_act: Activation,
    /// Softmax attention, the same in all layers that have it apart from [`LayerConfig::sliding_window`] and
    /// [`LayerConfig::rotary`].
    pub attention: AttentionConfig,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Attention of the layers with a [window](LayerConfig::sliding_window), in families where it is another one than
    /// that of the others.
    pub local: Option<Box<LocalAttention>>,
    /// Where the norms of both halves of a layer are.
    pub placement: NormPlacement,
    /// Whether every layer multiplies its whole output by a factor of its own.
    pub layer_scale: bool,
    /// Bound `c` of the logits, `c * tanh(logit / c)`.
    pub logit_cap: Option<f64>,
    /// How routed experts are selected and weighted.
    pub routing: Routing,
    /// Width of a latent that routed experts read and give in place of the residual stream: one map goes down to it in
    /// front of the experts, one up from the sum of what they give. Router and shared experts read the residual stream.
    pub expert_latent: Option<usize>,
    /// Decoder layers in order.
    pub layers: Vec<LayerConfig>,
    /// Layers after the last decoder layer that predict further tokens (multi-token prediction), as the config declares
    /// them. The weights may lack them: transformers drops them on saving. They are no part of `layers`.
    pub mtp_layers: usize,
    /// How the weights are quantized.
    pub quantization: Option<Quantization>,
    /// Token ids that end a text: from `generation_config.json`, else `config.json`; empty if neither names one.
    pub eos_token_ids: Vec<u32>,
    /// `dtype` (transformers 5) or `torch_dtype` (transformers 4), as written. The dtypes of the tensors are what
    /// counts.
    pub dtype: Option<String>,
}

impl ModelConfig {
    /// Reads a `config.json`, of a stock model, a ragged or a grouped one, with the end-of-text ids of
    /// `generation_config.json` where there is one.
    ///
    /// # Errors
    /// An unknown family, a model without routed experts, quantized weights, or a field that is missing, malformed,
    /// unsupported or contradicts another: one variant each, naming the field.
    pub fn from_json(config: &Value, generation: Option<&Value>) -> Result<Self> {
        if let Some(grouped) = Grouped::read(config)? {
            let mut parsed = Self::from_json(&grouped.original, generation)?;
            grouped.apply(&mut parsed)?;
            return Ok(parsed);
        }
        match Ragged::read(config)? {
            None => family_of(config)?.parse(config, generation),
            Some(ragged) => {
                let mut parsed = family_of(&ragged.original)?.parse(&ragged.original, generation)?;
                ragged.apply(&mut parsed)?;
                Ok(parsed)
            }
        }
    }

    /// The routed-expert shape: its MoE layers and the width of every expert.
    pub fn moe_shape(&self) -> MoeShape {
        let layers = self.layers.iter().enumerate().filter_map(|(layer, config)| match &config.ffn {
            Ffn::Moe(moe) => Some(MoeLayerShape { layer, widths: moe.widths.clone() }),
            Ffn::Dense { .. } | Ffn::None => None,
        });
        let gateless = (0..self.layers.len()).any(|layer| self.moe(layer).is_some_and(|moe| moe.gateless));
        let hidden_size = self.expert_hidden_size();
        MoeShape { gateless, hidden_size, top_k: self.routing.top_k, layers: layers.collect() }
    }

    /// Width of what routed experts read and give: the [latent](Self::expert_latent), or the residual stream.
    pub fn expert_hidden_size(&self) -> usize {
        self.expert_latent.unwrap_or(self.hidden_size)
    }

    /// Softmax attention of a decoder layer that has it.
    pub fn attention_of(&self, layer: usize) -> &AttentionConfig {
        self.local_of(layer).map_or(&self.attention, |local| &local.attention)
    }

    /// Whether the layer has [`ModelConfig::local`] attention, and which.
    pub fn local_of(&self, layer: usize) -> Option<&LocalAttention> {
        let windowed = self.layers.get(layer).is_some_and(|layer| layer.sliding_window.is_some());
        self.local.as_deref().filter(|_| windowed)
    }

    /// Sums of blocks of a layer that a backward pass through norms or a map after them needs.
    pub fn kept_sums(&self, layer: usize) -> usize {
        let latent = usize::from(self.expert_latent.is_some() && self.moe(layer).is_some());
        latent
            + match self.moe(layer).and_then(|moe| moe.shared.as_ref()).is_some_and(|shared| shared.apart) {
                true => 2,
                false => usize::from(self.norms_experts()),
            }
    }

    /// Whether there are such sums in any layer.
    pub fn kept_sums_anywhere(&self) -> bool {
        (0..self.layers.len()).any(|layer| self.kept_sums(layer) > 0)
    }

    /// Whether what the experts give goes through a norm before it is added to the residual stream, so that the stream
    /// is no linear function of it.
    pub fn norms_experts(&self) -> bool {
        matches!(self.placement, NormPlacement::After | NormPlacement::Both)
    }

    /// Whether the feed-forward half of a layer reads what the attention half does, instead of what that gives.
    pub fn is_parallel(&self) -> bool {
        self.placement == NormPlacement::Parallel
    }

    /// Factor on what the feed-forward half of a layer gives before it is added to the residual stream.
    pub fn ffn_factor(&self, layer: usize) -> f64 {
        let averaged = self.moe(layer).and_then(|moe| moe.shared.as_ref()).is_some_and(|shared| shared.averaged);
        self.multipliers.residual * if averaged { 0.5 } else { 1.0 }
    }

    /// Activation of the routed experts of a layer.
    pub fn expert_activation(&self, layer: usize) -> Activation {
        self.hidden_act.bounded(self.moe(layer).and_then(|moe| moe.limit))
    }

    /// The MoE block of a decoder layer, or `None` if the layer is dense or does not exist.
    pub fn moe(&self, layer: usize) -> Option<&MoeConfig> {
        match &self.layers.get(layer)?.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense { .. } | Ffn::None => None,
        }
    }
}

/// Activation of a gated FFN: how gate `g` and up `u` become a unit's value.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `silu(g) * u` with `silu(x) = x * sigmoid(x)`.
    Silu,
    /// `gelu(g) * u` with `gelu(x) = x * Phi(x)`, `Phi` the standard normal distribution (arXiv 1606.08415).
    Gelu,
    /// `gelu(g) * u` with the approximation `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`.
    GeluTanh,
    /// `relu(g) * u`.
    Relu,
    /// `min(silu(g), limit) * clamp(u, -limit, limit)`.
    BoundedSilu {
        /// The bound.
        limit: f64,
    },
    /// `g' * sigmoid(alpha * g') * (u' + 1)` with `g' = min(g, limit)` and `u' = clamp(u, -limit, limit)`, as in
    /// gpt-oss. A unit whose gate and up are zero still gives zero.
    ClampedSwiglu {
        /// Slope inside the sigmoid.
        alpha: f64,
        /// Bound of gate and up.
        limit: f64,
    },
}

impl Activation {
    /// The same with bounds, where there are some.
    pub fn bounded(self, limit: Option<f64>) -> Self {
        limit.map_or(self, |limit| Self::BoundedSilu { limit })
    }
}

/// Kind of the norms around attention, FFN and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// Division by the root mean square, a weight.
    Rms,
    /// The same with one added to the weight as it is stored: norms of the residual stream, of queries and of keys.
    RmsOnePlus,
    /// Mean taken out, division by the standard deviation, a weight and a bias.
    Layer,
    /// The same without a bias.
    LayerUnbiased,
}

/// Where the norms of both halves of a layer are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormPlacement {
    /// On what a half reads: `x + half(norm(x))`.
    #[default]
    Before,
    /// On what a half gives: `x + norm(half(x))`.
    After,
    /// On both: `x + norm(half(norm(x)))`.
    Both,
    /// One on what both halves read, which are side by side: `x + attention(norm(x)) + ffn(norm(x))`.
    Parallel,
}

/// Attention of layers with a window, where it is another one than that of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalAttention {
    /// Its heads and projections.
    pub attention: AttentionConfig,
    /// Its rotary position embedding.
    pub rope: RopeConfig,
}

/// Constant factors on the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// Factor on the embedding of every token.
    pub embedding: f64,
    /// Factor on the output of attention and of the FFN before it is added to the residual stream.
    pub residual: f64,
    /// Divisor of the logits.
    pub logits_divisor: f64,
}

impl Default for Multipliers {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits_divisor: 1.0 }
    }
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
    /// Most keys that a query sees, where an indexer chooses them; sequences up to so many tokens see all.
    pub selects: Option<usize>,
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
            AttentionKind::Grouped | AttentionKind::Other => self.head_dim,
            AttentionKind::Latent(latent) => latent.v_head_dim,
        }
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
    /// Something that this view does not describe. The checkpoint can be read, pruned and written; the model cannot
    /// run.
    Other,
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

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Whether dimensions `2i` and `2i + 1` are turned together; otherwise `i` and `i + rotary_dim / 2`.
    pub interleaved: bool,
    /// How positions past the trained length are handled.
    pub scaling: RopeScaling,
}

/// Scaling of the rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Frequencies are those of the base, unchanged.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Extension of the context.
        factor: f64,
    },
    /// Frequencies of Llama 3: those whose wavelength is above `original_max_position / low` are divided by `factor`,
    /// those below `original_max_position / high` stay, between them goes a ramp.
    Llama3 {
        /// Extension of the context.
        factor: f64,
        /// Turns over the original context below which frequencies are divided.
        low: f64,
        /// Turns over the original context above which frequencies stay.
        high: f64,
        /// Length of the sequences trained on.
        original_max_position: usize,
    },
    /// The base is `theta * alpha^(dim / (dim - 2))`, whatever the length of a text.
    StretchedBase {
        /// Extension of the context.
        alpha: f64,
        /// Width of a head.
        dim: usize,
    },
    /// The first `pairs` pairs of the head keep their frequencies divided by `factor`, the others do not turn.
    Proportional {
        /// Pairs of dimensions that turn.
        pairs: usize,
        /// Divisor of their frequencies.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071), with the fields of transformers' `rope_parameters`.
    Yarn {
        /// Extension of the context. `max_position_embeddings / original_max_position` if the config has none.
        factor: f64,
        /// Length of the sequences trained on; `max_position_embeddings` if the config does not say.
        original_max_position: usize,
        /// Rotations above which frequencies are kept.
        beta_fast: f64,
        /// Rotations below which frequencies are divided by `factor`.
        beta_slow: f64,
        /// Factor on cosine and sine; `None` means that it follows from `factor`, `mscale` and `mscale_all_dim`.
        attention_factor: Option<f64>,
        /// Numerator scale of the attention factor; counts only together with `mscale_all_dim`.
        mscale: Option<f64>,
        /// Denominator scale of the attention factor.
        mscale_all_dim: Option<f64>,
        /// Whether the bounds of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753) as phimoe uses it: frequencies divided by one list or the other, cosine and sine
    /// multiplied by one number or the other, by whether the sequence is longer than `original_max_position`.
    LongRope {
        /// Divisors of the frequencies of short sequences, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors of the frequencies of long sequences, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// Factor on cosine and sine of short sequences.
        short_mscale: f64,
        /// Factor on cosine and sine of long sequences.
        long_mscale: f64,
        /// Longest sequence that counts as short.
        original_max_position: usize,
    },
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Tokens that a query sees, itself included; `None` is all earlier ones.
    pub sliding_window: Option<usize>,
    /// Size of the chunks that a sequence is cut into, where a query sees its own chunk only.
    pub chunk: Option<usize>,
    /// Whether queries and keys get the rotary embedding; where not, the layer knows no positions.
    pub rotary: bool,
    /// What looks at other tokens.
    pub mixer: Mixer,
    /// What follows the attention.
    pub ffn: Ffn,
}

/// What looks at other tokens in a decoder layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mixer {
    /// [`ModelConfig::attention`].
    Attention,
    /// Gated DeltaNet (arXiv 2412.06464), a linear attention.
    DeltaNet(DeltaNet),
    /// A gated convolution of every channel by itself.
    ShortConvolution {
        /// Tokens that it sees, the current one included.
        kernel: usize,
    },
    /// A state space layer, Mamba2 (arXiv 2405.21060).
    Mamba(Mamba),
    /// Nothing: the layer is a feed-forward half alone.
    None,
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

/// Feed-forward part of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One gated FFN for all tokens.
    Dense {
        /// Its width.
        intermediate_size: usize,
        /// Whether it has no gate; see [`MoeConfig::gateless`].
        gateless: bool,
    },
    /// Routed experts.
    Moe(MoeConfig),
    /// Nothing: the layer only looks at other tokens.
    None,
}

/// MoE block of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Intermediate width of every routed expert, `[E]`. Widths differ in a ragged checkpoint only.
    pub widths: Vec<usize>,
    /// Biases of every routed expert.
    pub biases: ExpertBiases,
    /// Whether experts have no gate of their own: files hold up and down alone, and the up projection is the gate, too.
    /// With [`Activation::Relu`] that is ReLU², `relu(u) u`. A unit is its up row and its down column; whatever asks
    /// for its gate row gets its up row.
    pub gateless: bool,
    /// The stored set of weights of every routed expert, `[E]`, in a grouped checkpoint: experts of one set share
    /// weights. Otherwise every expert has its own.
    pub sets: Option<Vec<u32>>,
    /// Expert that every token goes through.
    pub shared: Option<SharedExpert>,
    /// Bound of the units' factors; see [`Activation::BoundedSilu`].
    pub limit: Option<f64>,
}

impl MoeConfig {
    /// Number of routed experts, `E`.
    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// The stored set of weights of an expert; the expert itself outside grouped checkpoints.
    pub fn stored(&self, expert: usize) -> usize {
        self.sets.as_ref().and_then(|sets| sets.get(expert)).map_or(expert, |set| *set as usize)
    }

    /// Width of every stored set of weights: of every expert, or of fewer where experts share.
    pub fn stored_widths(&self) -> Cow<'_, [usize]> {
        let Some(sets) = &self.sets else { return Cow::Borrowed(&self.widths) };
        let mut widths = vec![0; sets.iter().max().map_or(0, |set| *set as usize + 1)];
        sets.iter().zip(&self.widths).for_each(|(set, width)| widths[*set as usize] = *width);
        Cow::Owned(widths)
    }
}

/// Expert that every token goes through. Families with several shared experts store them as one.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// Its width; that of all shared experts together where there are several.
    pub intermediate_size: usize,
    /// Whether its output is multiplied by `sigmoid(x · gate)`.
    pub gated: bool,
    /// Whether one matrix holds its gate and its up projection, the rows of gate first.
    pub packed: bool,
    /// Whether it is a block beside the experts, with norms of its own: `norm(shared(norm(x))) +
    /// norm(experts(norm(x)))`.
    pub apart: bool,
    /// Whether it has no gate; see [`MoeConfig::gateless`].
    pub gateless: bool,
    /// Whether its output and that of the routed experts together are averaged instead of added.
    pub averaged: bool,
    /// Bound of its units' factors; see [`Activation::BoundedSilu`].
    pub limit: Option<f64>,
}

impl SharedExpert {
    /// One of this width, without extras.
    pub fn new(intermediate_size: usize) -> Self {
        Self {
            intermediate_size,
            gated: false,
            packed: false,
            apart: false,
            gateless: false,
            averaged: false,
            limit: None,
        }
    }
}

/// How routed experts are selected and weighted.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// From router logits to selected experts and weights.
    pub kind: RoutingKind,
    /// Factor on all weights.
    pub scale: f32,
    /// Whether a bias `[E]` is added to the router logits.
    pub bias: bool,
    /// Added to the sum that weights of [`RoutingKind::Sigmoid`] are divided by.
    pub norm_eps: f64,
    /// Whether weights multiply what an expert reads instead of what it gives.
    pub on_inputs: bool,
    /// Whether the router reads the residual stream through a norm of its own, whose weight is `H^-0.5` times what is
    /// stored.
    pub own_norm: bool,
    /// Whether the weight of every expert is multiplied by a factor of its own `[E]` at the end.
    pub expert_scales: bool,
}

impl Routing {
    /// What DeepSeek-V3 adds to the sum that weights are divided by, and most models since.
    pub const NORM_EPS: f64 = 1e-20;

    /// Routing to `top_k` experts per token, without a factor and without a bias.
    pub fn new(top_k: usize, kind: RoutingKind) -> Self {
        Self {
            top_k,
            kind,
            scale: 1.0,
            bias: false,
            norm_eps: Self::NORM_EPS,
            on_inputs: false,
            own_norm: false,
            expert_scales: false,
        }
    }

    /// Whether a learnt bias `[E]` takes part in the selection of experts, but not in their weights.
    pub fn correction_bias(&self) -> bool {
        match self.kind {
            RoutingKind::Sigmoid { correction_bias, .. } => correction_bias,
            RoutingKind::SoftmaxCorrected { .. } => true,
            _ => false,
        }
    }

    /// Groups that experts are selected from, if there are any.
    pub fn groups(&self) -> Option<Groups> {
        match self.kind {
            RoutingKind::Sigmoid { groups, .. } => groups,
            RoutingKind::SoftmaxGroupTopK { groups } => Some(groups),
            _ => None,
        }
    }

    /// Checks that routing by groups still works with these of the `experts` of a layer, and their rows: as many left
    /// in every group, and enough of them in the selected groups. Routing without groups works with any.
    ///
    /// # Errors
    /// [`Error::BrokenRouting`] names the layer.
    pub fn check_kept(&self, layer: usize, experts: usize, kept: &[usize]) -> Result<()> {
        let Some(groups) = self.groups() else { return Ok(()) };
        let size = (experts / groups.count).max(1);
        let mut left = vec![0; groups.count];
        for expert in kept {
            left[(expert / size).min(groups.count - 1)] += 1;
        }
        let (first, top_k) = (left[0], self.top_k);
        let broken = |reason: String| Err(Error::BrokenRouting { layer, reason });
        if kept.len() < top_k {
            return broken(format!("{} experts are left, but the router selects {top_k}", kept.len()));
        }
        if left.iter().any(|count| *count != first) {
            return broken(format!(
                "its {} groups of experts would be left with {left:?}; routing by groups needs as many in each",
                groups.count
            ));
        }
        if groups.score == GroupScore::TopTwoSum && first < 2 {
            return broken(format!(
                "{first} expert of every group would be left, but groups are ranked by their two best"
            ));
        }
        if groups.top * first < top_k {
            return broken(format!("{} selected groups of {first} experts cannot give {top_k} per token", groups.top));
        }
        Ok(())
    }
}

/// From router logits to selected experts and their weights. [`Routing::scale`] multiplies the weights at the end.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RoutingKind {
    /// Softmax over all experts, then the `top_k` largest.
    SoftmaxTopK {
        /// Whether the selected weights are divided by their sum.
        renormalize: bool,
    },
    /// The `top_k` largest logits, then softmax over those.
    TopKSoftmax,
    /// Softmax over all experts, groups selected by [`Groups`], then the `top_k` largest within them (others count as
    /// 0). Weights are not divided by their sum. DeepSeek-V2's `group_limited_greedy`.
    SoftmaxGroupTopK {
        /// Groups that experts are selected from.
        groups: Groups,
    },
    /// Softmax over all experts; the `top_k` largest of softmax plus correction bias are selected; their softmax values
    /// are divided by `max(sum, norm_min)`. Ernie 4.5.
    SoftmaxCorrected {
        /// Smallest divisor.
        norm_min: f64,
    },
    /// Sigmoid of every logit; selection by sigmoid plus correction bias, if there is one, within the selected groups,
    /// if there are any (experts of other groups are never selected).
    Sigmoid {
        /// Whether the selected weights are divided by their sum plus [`Routing::norm_eps`].
        renormalize: bool,
        /// Whether a learnt bias is added for the selection (not for the weights).
        correction_bias: bool,
        /// Whether whole groups of experts are selected first.
        groups: Option<Groups>,
    },
    /// Two experts, one after the other (arXiv 2409.12136, at inference): the expert of the largest logit `m` first,
    /// weighted by the softmax over the experts with `(m - s) / max(|s|, m) <= 2 * jitter_eps`; then the same with that
    /// expert taken out of the maximum and the softmax.
    Sparsemixer {
        /// Half the relative distance from the maximum within which logits take part in the softmax.
        jitter_eps: f64,
    },
}

/// Group-limited selection: neighboring experts form `count` groups of equal size, of which the best `top` take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups of equal size.
    pub count: usize,
    /// Groups that experts are selected from.
    pub top: usize,
    /// What a group is ranked by.
    pub score: GroupScore,
}

/// What a group of experts is ranked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupScore {
    /// Its largest value.
    Max,
    /// The sum of its two largest values.
    TopTwoSum,
}
