//! Dense decoders: no experts, but what experts can be made of.
//!
//! They are read by [`Checkpoint::open_dense`](crate::Checkpoint::open_dense) alone: whatever needs experts refuses
//! them by name, as before.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, Ffn, LayerConfig, Mixer, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::family::{CONFIG, Family};
use crate::json::Fields;

use super::{read, rope};

/// A dense family: Llama and what differs from it.
pub(crate) struct Dense {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether queries, keys and values have biases where `attention_bias` is no field.
    pub qkv_bias: bool,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether `sliding_window` alone switches a window on; otherwise `use_sliding_window` does, and is refused.
    pub window: bool,
}

/// Every dense family.
pub(crate) static DENSE: &[&dyn Family] = &[
    // SmolLM, SmolLM2, TinyLlama and many others are of this type.
    &Dense { model_type: "llama", qkv_bias: false, qk_norm: QkNorm::None, window: false },
    &Dense { model_type: "mistral", qkv_bias: false, qk_norm: QkNorm::None, window: true },
    &Dense { model_type: "qwen2", qkv_bias: true, qk_norm: QkNorm::None, window: false },
    &Dense { model_type: "qwen3", qkv_bias: false, qk_norm: QkNorm::Head, window: false },
];

impl Family for Dense {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let window = match self.window {
            true => read::plain_window(&config)?,
            false => match read::window(&config)? {
                Some(_) => return Err(config.invalid("use_sliding_window", "false: windows of dense layers")),
                None => None,
            },
        };
        if config.bool("mlp_bias")?.unwrap_or(false) {
            return Err(config.invalid("mlp_bias", "false: no expert of a stock family has biases in this form"));
        }
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let attention =
            AttentionConfig { qkv_bias: bias || self.qkv_bias, output_bias: bias, qk_norm: self.qk_norm, ..plain };
        let layer = LayerConfig {
            sliding_window: window,
            chunk: None,
            rotary: true,
            mixer: Mixer::Attention,
            keys_of: None,
            ffn: Ffn::Dense { intermediate_size: read::size(&config, "intermediate_size")?, gateless: false },
        };
        let model = read::Model {
            model_type: self.model_type,
            attention,
            rope: rope::read(&config, &rope::Dialect { llama3: true, ..rope::Dialect::new(max_position) })?,
            // Of no consequence: there is no layer that routes.
            routing: Routing::new(1, RoutingKind::SoftmaxTopK { renormalize: true }),
            layers: vec![layer; read::num_layers(&config)?],
        };
        model.read(&config, generation)
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &[]
    }
}
