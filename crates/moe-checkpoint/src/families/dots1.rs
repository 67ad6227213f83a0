//! dots.llm1: norms per head, dense first layers, shared experts, sigmoid routing with correction bias; windows in the last layers.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, GroupScore, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `dots1`.
pub(crate) struct Dots1;

impl Family for Dots1 {
    fn model_type(&self) -> &'static str {
        "dots1"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&config, hidden_size)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let first_sliding = config.integer("max_window_layers", 0, read::MAX_SIZE)?.unwrap_or(62);
        let windows = read::typed_windows(&config, |layer| layer >= first_sliding)?;
        let keys = self.expert_count_keys();
        let (layers, top_k) = read::dense_then_moe(&config, keys, "n_shared_experts", 0, &windows)?;
        let groups = read::groups(&config, read::experts_of(&layers), top_k, GroupScore::TopTwoSum)?;
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(false);
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let attention = AttentionConfig {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            qk_norm: QkNorm::Head,
            ..read::grouped_attention(num_heads, num_kv_heads, head_dim)
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
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
