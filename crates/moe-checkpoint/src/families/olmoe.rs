//! OLMoE: RMSNorm over the whole query and key projections, optional clamp of queries, keys and values.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::family::{CONFIG, Family};
use crate::json::Fields;

use super::{read, rope};

/// The family `olmoe`.
pub(crate) struct Olmoe;

impl Family for Olmoe {
    fn model_type(&self) -> &'static str {
        "olmoe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(false);
        let attention = AttentionConfig {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            qk_norm: QkNorm::Projection,
            qkv_clip: config.positive_float("clip_qkv")?,
            ..plain
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize }),
            layers,
        };
        model.read(&config, generation)
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
