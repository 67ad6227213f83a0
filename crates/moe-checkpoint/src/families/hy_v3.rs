//! Hunyuan 3: norms per head, dense first layers, a shared expert, sigmoid routing with correction bias.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `hy_v3`.
pub(crate) struct HyV3;

impl Family for HyV3 {
    fn model_type(&self) -> &'static str {
        "hy_v3"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&config, hidden_size)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let keys = self.expert_count_keys();
        let (layers, top_k) = read::dense_then_moe(&config, keys, "num_shared_experts", 1, &windows)?;
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
                kind: RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None },
                scale: config.positive_float("router_scaling_factor")?.unwrap_or(2.826) as f32,
                bias: false,
            },
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::Router) => format!("model.layers.{layer}.mlp.router.gate.weight"),
            Role::Layer(layer, LayerRole::CorrectionBias) => format!("model.layers.{layer}.mlp.expert_bias"),
            role => names::shared_mlp(role),
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
