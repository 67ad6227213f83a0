//! GLM-4.5, and the text model of GLM-4.5V: sigmoid routing with correction bias, a part of the head rotated, dense first layers.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, GroupScore, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `glm4_moe`, under any of its names.
pub(crate) struct Glm4Moe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether query, key and value projections have a bias where a config says nothing.
    pub attention_bias: bool,
}

impl Family for Glm4Moe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&config, hidden_size)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let layers = read::first_dense(&config, self.expert_count_keys(), "n_shared_experts")?;
        let (layers, top_k) = layers;
        let groups = read::groups(&config, read::experts_of(&layers), top_k, GroupScore::TopTwoSum)?;
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(true);
        let qk_norm = match config.bool("use_qk_norm")?.unwrap_or(false) {
            true => QkNorm::Head,
            false => QkNorm::None,
        };
        let attention = AttentionConfig {
            rotary_dim: rope::rotary_dim(&config, head_dim, 0.5)?,
            // The output projection never has a bias.
            qkv_bias: config.bool("attention_bias")?.unwrap_or(self.attention_bias),
            qk_norm,
            ..read::grouped_attention(num_heads, num_kv_heads, head_dim)
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { partial: true, ..rope::Dialect::new(max_position) })?,
            routing: Routing {
                top_k,
                kind: RoutingKind::Sigmoid { renormalize, correction_bias: true, groups },
                scale: config.positive_float("routed_scaling_factor")?.unwrap_or(1.0) as f32,
                bias: false,
            },
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::shared_experts(role)
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        names::layer_of(name)
    }

    fn width_key(&self) -> &'static str {
        "moe_intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }

    fn size_keys(&self, role: Role) -> &'static str {
        names::size_keys(role)
    }
}
