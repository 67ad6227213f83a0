//! Qwen3-MoE, and the text models of Qwen3-VL and Qwen3-Omni: RMSNorm on every query and key head, no shared expert.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, Multipliers, NormKind, QkNorm, Routing, RoutingKind};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `qwen3_moe`, under any of its names.
pub(crate) struct Qwen3Moe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether weights are divided by their sum: by `norm_topk_prob`, which is this where it is absent, or always.
    pub renormalize: Renormalize,
    /// The layout of released checkpoints.
    pub stock_layout: ExpertLayout,
}

/// Whether routing weights are divided by their sum.
pub(crate) enum Renormalize {
    /// If `norm_topk_prob` says so, which is this where it is absent.
    Default(bool),
    /// Whatever a config says.
    Always,
}

impl Family for Qwen3Moe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&config, hidden_size)?;
        let max_position_embeddings = read::size(&config, "max_position_embeddings")?;
        // One mask for all layers in transformers 4 and 5 alike; `layer_types` is not a field of this family.
        let windows = vec![read::window(&config)?; read::num_layers(&config)?];
        let layers =
            read::SparseLayers { expert_count_keys: self.expert_count_keys(), windows: &windows, shared: None };
        let (layers, top_k) = layers.read(&config)?;
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let renormalize = match self.renormalize {
            Renormalize::Default(default) => config.bool("norm_topk_prob")?.unwrap_or(default),
            Renormalize::Always => true,
        };
        Ok(ModelConfig {
            model_type: self.model_type().to_string(),
            hidden_size,
            vocab_size: read::size(&config, "vocab_size")?,
            norm: NormKind::Rms,
            norm_eps: read::norm_eps(&config)?,
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(false),
            max_position_embeddings,
            head_bias: false,
            multipliers: Multipliers::default(),
            mtp_layers: 0,
            hidden_act: read::activation(&config)?,
            attention: AttentionConfig {
                qkv_bias: attention_bias,
                output_bias: attention_bias,
                qk_norm: QkNorm::Head,
                ..read::grouped_attention(num_heads, num_kv_heads, head_dim)
            },
            rope: rope::read(&config, &rope::Dialect::new(max_position_embeddings))?,
            routing: Routing { top_k, kind: RoutingKind::SoftmaxTopK { renormalize }, scale: 1.0, bias: false },
            layers,
            quantization: read::quantization(&config)?,
            eos_token_ids: read::eos_token_ids(&config, generation)?,
            dtype: read::dtype(&config)?,
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::tensor_name(role)
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor)
    }

    fn stock_layout(&self) -> ExpertLayout {
        self.stock_layout
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        names::layer_of(name)
    }

    fn width_key(&self) -> &'static str {
        "moe_intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }

    fn size_keys(&self, role: Role) -> &'static str {
        names::size_keys(role)
    }
}
