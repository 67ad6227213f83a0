//! Hunyuan 3: norms per head, dense first layers, a shared expert, sigmoid routing with correction bias.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::Renormalize;
use super::{names, read, rope};

/// The family `hy_v3`.
pub(crate) struct HyV3;

impl Family for HyV3 {
    fn model_type(&self) -> &'static str {
        "hy_v3"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let moe = read::Corrected {
            expert_count_keys: self.expert_count_keys(),
            shared_count_key: "num_shared_experts",
            dense: 1,
            windows: &windows,
            renormalize: Renormalize::Always,
            scale: ("router_scaling_factor", 2.826),
        };
        let (layers, routing) = moe.read(&config)?;
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let attention =
            AttentionConfig { qkv_bias: attention_bias, output_bias: attention_bias, qk_norm: QkNorm::Head, ..plain };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing,
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

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
