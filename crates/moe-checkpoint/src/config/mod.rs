//! The typed, family-independent view of a `config.json`.
//!
//! The raw JSON is kept beside it ([`Checkpoint::raw_config`](crate::Checkpoint::raw_config)), so that keys unknown to
//! this view survive an edit.

mod attention;
mod ffn;
mod mixer;
mod rope;
mod routing;
mod streams;

use serde_json::Value;

use crate::Result;
use crate::family::family_of;
use crate::formats::Quantization;
use crate::grouped::Grouped;
use crate::ragged::Ragged;
use crate::shape::{MoeLayerShape, MoeShape};

pub use attention::{
    AttentionConfig, AttentionKind, KeySelection, LatentAttention, LocalAttention, OutputGate, QkNorm, QueryGrowth,
};
pub use ffn::{Activation, Ffn, MoeConfig, SharedExpert};
pub use mixer::{
    ChannelDelta, CompressedAttention, CompressedIndexer, DeltaNet, HeadMixture, KeyCompression, LightningAttention,
    Mamba, Mixer,
};
pub use rope::{RopeConfig, RopeScaling};
pub use routing::{GroupScore, Groups, Routing, RoutingKind};
pub use streams::HyperConnections;

/// What a decoder model is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, e.g. `qwen2_moe`; that of the original model for a ragged checkpoint.
    pub model_type: String,
    /// Width of the residual stream, `H`; of each of them where there are [several](Self::streams).
    pub hidden_size: usize,
    /// Rows of the embedding and of the head, `V`.
    pub vocab_size: usize,
    /// Norms before attention, before the FFN and before the head.
    pub norm: NormKind,
    /// Epsilon of those norms, and of the norms of queries and keys of [`AttentionKind::Grouped`].
    pub norm_eps: f64,
    /// Epsilon of the norm before the head, where it is another one.
    pub final_norm_eps: Option<f64>,
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
    /// Factors of a model whose halves of layers are added to what they read, after its norm, instead of to the
    /// residual stream: `a norm(x) + b half(norm(x))`.
    pub normed_residual: Option<NormedResidual>,
    /// Whether every layer multiplies its whole output by a factor of its own.
    pub layer_scale: bool,
    /// Where every layer has an input of its own besides the residual stream.
    pub layer_inputs: Option<LayerInputs>,
    /// Several residual streams and how halves of layers read and write them, in place of one that they are added to.
    pub streams: Option<HyperConnections>,
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
            None => {
                let mut parsed = family_of(config)?.parse(config, generation)?;
                crate::formats::compressed::experts_per_layer(config, &mut parsed)?;
                Ok(parsed)
            }
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

    /// Width of what layers give each other: all residual streams beside each other.
    pub fn stream_width(&self) -> usize {
        self.hidden_size * self.streams.as_ref().map_or(1, |streams| streams.count)
    }

    /// Whether any layer routes by a [table](MoeConfig::by_table).
    pub fn routes_by_tables(&self) -> bool {
        (0..self.layers.len()).any(|layer| self.moe(layer).is_some_and(|moe| moe.by_table))
    }

    /// Whether a learnt bias takes part in the selection of the experts of a layer.
    pub fn corrects_selection(&self, layer: usize) -> bool {
        self.routing.correction_bias() && self.moe(layer).is_some_and(|moe| !moe.by_table)
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
        let streams = usize::from(self.streams.is_some() && self.moe(layer).is_some());
        latent
            + streams
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
        let half = self.normed_residual.as_ref().map_or(self.multipliers.residual, |factors| factors.ffn.half);
        half * if averaged { 0.5 } else { 1.0 }
    }

    /// Factor on the normed input that the feed-forward half of a layer is added to, where it is added to that.
    pub fn ffn_carry(&self) -> Option<f64> {
        self.normed_residual.as_ref().map(|factors| factors.ffn.carry)
    }

    /// Factors of the half of a layer that looks at other tokens: on what it gives, and on the normed input that it is
    /// added to, where it is added to that.
    pub fn mixer_factors(&self, layer: usize) -> (f64, Option<f64>) {
        let linear = self.layers.get(layer).is_some_and(|layer| layer.mixer != Mixer::Attention);
        let of = |factors: &NormedResidual| if linear { factors.linear } else { factors.full };
        let factors = self.normed_residual.as_ref().map(of);
        factors.map_or((self.multipliers.residual, None), |factors| (factors.half, Some(factors.carry)))
    }

    /// Whether what the experts of a layer give joins the residual stream at the end of the next layer; see
    /// [`MoeConfig::shortcut`].
    pub fn starts_shortcut(&self, layer: usize) -> bool {
        self.moe(layer).is_some_and(|moe| moe.shortcut)
    }

    /// Whether what the experts of the layer before give joins the residual stream at the end of this one.
    pub fn ends_shortcut(&self, layer: usize) -> bool {
        layer > 0 && self.starts_shortcut(layer - 1)
    }

    /// Whether any layer starts a shortcut.
    pub fn has_shortcuts(&self) -> bool {
        (0..self.layers.len()).any(|layer| self.starts_shortcut(layer))
    }

    /// Whether layers read keys and values of layers before them; see [`LayerConfig::keys_of`].
    pub fn shares_keys(&self) -> bool {
        self.layers.iter().any(|layer| layer.keys_of.is_some())
    }

    /// Whether layers after this one read its keys and values.
    pub fn lends_keys(&self, layer: usize) -> bool {
        self.layers.iter().any(|other| other.keys_of == Some(layer))
    }

    /// Why layers can neither be left out nor repeated nor passed by some tokens, where they cannot.
    pub fn inseparable(&self) -> Option<&'static str> {
        if self.has_shortcuts() {
            return Some("whose experts join the residual stream at the end of the next layer");
        }
        if self.shares_keys() {
            return Some("whose last layers read the keys and values of layers before them");
        }
        self.layer_inputs.is_some().then_some("whose layers have inputs of their own, in one table for all of them")
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

/// Factors of halves of layers that are added to their normed input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormedResidual {
    /// Of softmax attention.
    pub full: HalfFactors,
    /// Of linear attention.
    pub linear: HalfFactors,
    /// Of the feed-forward half.
    pub ffn: HalfFactors,
}

/// Factors of a half of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HalfFactors {
    /// On the normed input.
    pub carry: f64,
    /// On what the half gives.
    pub half: f64,
}

/// Inputs that every layer has besides the residual stream (per-layer embeddings): `P` numbers per token and layer,
/// `(norm(projection embedding) + row) / sqrt(2)`, where `row` is that of the token in a table of all layers. At its
/// end a layer adds `norm(output (act(gate x) * input))` to its residual stream `x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerInputs {
    /// Width of the input of a layer, `P`.
    pub width: usize,
    /// Rows of the table, one per token id.
    pub vocab_size: usize,
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
    /// The layer before this one whose keys and values its attention reads, if it makes none of its own.
    pub keys_of: Option<usize>,
    /// What follows the attention.
    pub ffn: Ffn,
}
