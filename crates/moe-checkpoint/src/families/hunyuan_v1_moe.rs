//! Hunyuan-A13B: norms of query and key heads after their rotation, a shared expert of the width of a routed one,
//! softmax routing.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Routing, RoutingKind, SharedExpert};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `hunyuan_v1_moe`.
pub(crate) struct HunyuanV1Moe;

impl Family for HunyuanV1Moe {
    fn model_type(&self) -> &'static str {
        "hunyuan_v1_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "moe_topk",
            width_key: self.width_key(),
            bias: false,
            shared: Some(SharedExpert::new(read::size(&config, "intermediate_size")?)),
            is_moe: vec![true; windows.len()],
            why: "no expert".to_string(),
            windows: &windows,
        };
        let (layers, top_k) = moe.read(&config)?;
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let attention = AttentionConfig {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: QkNorm::Head,
            norm_after_rotation: true,
            ..read::attention(&config)?
        };
        let model = read::Model {
            model_type: self.model_type(),
            rope: rope::read(
                &config,
                &rope::Dialect { ntk_alpha: Some(attention.head_dim), ..rope::Dialect::new(max_position) },
            )?,
            attention,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize: true }),
            layers,
        };
        let norm_eps = config.positive_float("rms_norm_eps")?.unwrap_or(1e-5);
        Ok(ModelConfig { norm_eps, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        let Role::Layer(layer, of) = role else { return names::tensor_name(role) };
        let name = match of {
            LayerRole::QueryNorm => "self_attn.query_layernorm.weight",
            LayerRole::KeyNorm => "self_attn.key_layernorm.weight",
            LayerRole::Router => "mlp.gate.wg.weight",
            _ => return names::shared_mlp(role),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn shared_follows_width(&self) -> bool {
        true
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["moe_topk", "num_experts_per_tok"]
    }
}
