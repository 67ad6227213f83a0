//! K-EXAONE: as dots.llm1, but only layers with a window rotate queries and keys, and best groups are selected first.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, GroupScore, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `exaone_moe`.
pub(crate) struct ExaoneMoe;

impl Family for ExaoneMoe {
    fn model_type(&self) -> &'static str {
        "exaone_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&config, hidden_size)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let pattern = config.integer("sliding_window_pattern", 1, read::MAX_SIZE)?.unwrap_or(4);
        let windows = read::typed_windows(&config, |layer| !(layer + 1).is_multiple_of(pattern))?;
        let keys = self.expert_count_keys();
        let (mut layers, top_k) = read::dense_then_moe(&config, keys, "num_shared_experts", 1, &windows)?;
        // Without any window, all layers rotate.
        if windows.iter().any(Option::is_some) {
            layers.iter_mut().for_each(|layer| layer.rotary = layer.sliding_window.is_some());
        }
        let groups = read::groups(&config, read::experts_of(&layers), top_k, GroupScore::TopTwoSum)?;
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(true);
        let attention =
            AttentionConfig { qk_norm: QkNorm::Head, ..read::grouped_attention(num_heads, num_kv_heads, head_dim) };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { theta: 1_000_000.0, ..rope::Dialect::new(max_position) })?,
            routing: Routing {
                top_k,
                kind: RoutingKind::Sigmoid { renormalize, correction_bias: true, groups },
                scale: config.positive_float("routed_scaling_factor")?.unwrap_or(2.5) as f32,
                bias: false,
            },
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::CorrectionBias) => {
                format!("model.layers.{layer}.mlp.e_score_correction_bias")
            }
            role => names::shared_experts(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
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
