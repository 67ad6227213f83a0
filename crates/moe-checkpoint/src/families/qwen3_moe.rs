//! Qwen3-MoE, and the text models of Qwen3-VL and Qwen3-Omni: RMSNorm on every query and key head, no shared expert.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertLayout;
use crate::family::{CONFIG, Family};
use crate::json::Fields;

use super::read::Renormalize;
use super::{read, rope};

/// The family `qwen3_moe`, under any of its names.
pub(crate) struct Qwen3Moe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether weights are divided by their sum: by `norm_topk_prob`, which is this where it is absent, or always.
    pub renormalize: Renormalize,
    /// The layout of released checkpoints.
    pub stock_layout: ExpertLayout,
}

impl Family for Qwen3Moe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        // One mask for all layers in transformers 4 and 5 alike; `layer_types` is not a field of this family.
        let windows = vec![read::window(&config)?; read::num_layers(&config)?];
        let layers =
            read::SparseLayers { expert_count_keys: self.expert_count_keys(), windows: &windows, shared: None };
        let (layers, top_k) = layers.read(&config)?;
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let renormalize = self.renormalize.read(&config)?;
        let attention =
            AttentionConfig { qkv_bias: attention_bias, output_bias: attention_bias, qk_norm: QkNorm::Head, ..plain };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize }),
            layers,
        };
        model.read(&config, generation)
    }

    fn stock_layout(&self) -> ExpertLayout {
        self.stock_layout
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
