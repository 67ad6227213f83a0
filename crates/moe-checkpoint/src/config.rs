//! The typed, family-independent view of a `config.json`.
//!
//! The raw JSON is kept beside it ([`Checkpoint::raw_config`](crate::Checkpoint::raw_config)), so that keys unknown to
//! this view survive an edit.

use serde_json::Value;

use crate::Result;
use crate::family::family_of;
use crate::ragged::Ragged;
use crate::shape::{MoeLayerShape, MoeShape};

/// What a decoder model is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, e.g. `qwen2_moe`; that of the original model for a ragged checkpoint.
    pub model_type: String,
    /// Width of the residual stream, `H`.
    pub hidden_size: usize,
    /// Rows of the embedding and of the head, `V`.
    pub vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Longest sequence the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Activation of the gate of every FFN.
    pub hidden_act: Activation,
    /// Attention, the same in all layers apart from [`LayerConfig::sliding_window`].
    pub attention: AttentionConfig,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// How routed experts are selected and weighted.
    pub routing: Routing,
    /// Decoder layers in order.
    pub layers: Vec<LayerConfig>,
    /// Token ids that end a text: from `generation_config.json`, else `config.json`; empty if neither names one.
    pub eos_token_ids: Vec<u32>,
    /// `dtype` (transformers 5) or `torch_dtype` (transformers 4), as written. The dtypes of the tensors are what counts.
    pub dtype: Option<String>,
}

impl ModelConfig {
    /// Reads a `config.json`, of a stock model or a ragged one, with the end-of-text ids of `generation_config.json`
    /// where there is one.
    ///
    /// # Errors
    /// An unknown family, a model without routed experts, quantised weights, or a field that is missing, malformed,
    /// unsupported or contradicts another: one variant each, naming the field.
    pub fn from_json(config: &Value, generation: Option<&Value>) -> Result<Self> {
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
            Ffn::Dense { .. } => None,
        });
        MoeShape { hidden_size: self.hidden_size, top_k: self.routing.top_k, layers: layers.collect() }
    }

    /// The MoE block of a decoder layer, or `None` if the layer is dense or does not exist.
    pub fn moe(&self, layer: usize) -> Option<&MoeConfig> {
        match &self.layers.get(layer)?.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense { .. } => None,
        }
    }
}

/// Activation of a gated FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Whether query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Whether queries and keys go through an RMSNorm over `head_dim` before the rotary embedding.
    pub qk_norm: bool,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How positions past the trained length are handled.
    pub scaling: RopeScaling,
}

/// Scaling of the rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Extension of the context.
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
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Tokens that a query sees, itself included; `None` is all earlier ones.
    pub sliding_window: Option<usize>,
    /// What follows the attention.
    pub ffn: Ffn,
}

/// Feed-forward part of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One gated FFN for all tokens.
    Dense {
        /// Its width.
        intermediate_size: usize,
    },
    /// Routed experts.
    Moe(MoeConfig),
}

/// MoE block of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Intermediate width of every routed expert, `[E]`. Widths differ in a ragged checkpoint only.
    pub widths: Vec<usize>,
    /// Expert that every token goes through.
    pub shared: Option<SharedExpert>,
}

impl MoeConfig {
    /// Number of routed experts, `E`.
    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }
}

/// Expert that every token goes through.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// Its width.
    pub intermediate_size: usize,
    /// Whether its output is multiplied by `sigmoid(x · gate)`.
    pub gated: bool,
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
}

/// From router logits to selected experts and their weights.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RoutingKind {
    /// Softmax over all experts, then the `top_k` largest.
    SoftmaxTopK {
        /// Whether the selected weights are divided by their sum.
        renormalise: bool,
    },
    /// The `top_k` largest logits, then softmax over those.
    TopKSoftmax,
    /// Sigmoid of every logit, then the `top_k` largest.
    Sigmoid {
        /// Whether the selected weights are divided by their sum.
        renormalise: bool,
        /// Whether a learnt bias is added for the selection (not for the weights).
        correction_bias: bool,
        /// Whether whole groups of experts are selected first.
        groups: Option<Groups>,
    },
}

/// Group-limited selection of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups of equal size.
    pub count: usize,
    /// Groups that experts are selected from.
    pub top: usize,
}
