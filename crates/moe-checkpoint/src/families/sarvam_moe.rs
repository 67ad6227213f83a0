//! Sarvam: GLM-4.5 by other names, with the projections of queries, keys and values in one matrix.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::Renormalize;
use super::{names, read, rope};

/// The family `sarvam_moe`.
pub(crate) struct SarvamMoe;

impl Family for SarvamMoe {
    fn model_type(&self) -> &'static str {
        "sarvam_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let shared_count_key = match config.value("n_shared_experts") {
            Some(_) => "n_shared_experts",
            None => "num_shared_experts",
        };
        let moe = read::Corrected {
            expert_count_keys: self.expert_count_keys(),
            shared_count_key,
            dense: 1,
            windows: &windows,
            renormalize: Renormalize::Default(true),
            scale: ("routed_scaling_factor", 2.5),
        };
        let (layers, routing) = moe.read(&config)?;
        let plain = read::attention(&config)?;
        let qk_norm = match config.bool("use_qk_norm")?.unwrap_or(true) {
            true => crate::QkNorm::Head,
            false => crate::QkNorm::None,
        };
        for key in ["attention_bias", "use_qkv_bias", "use_bias"] {
            if config.bool(key)?.unwrap_or(false) {
                return Err(config.invalid(key, "false, as in all released models"));
            }
        }
        let attention = AttentionConfig {
            rotary_dim: rope::rotary_dim(&config, plain.head_dim, 1.0)?,
            qk_norm,
            packed: true,
            ..plain
        };
        let dialect = rope::Dialect { partial: true, ..rope::Dialect::new(max_position) };
        let rope = rope::read(&config, &dialect)?;
        let model = read::Model { model_type: self.model_type(), attention, rope, routing, layers };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        let (layer, of) = match role {
            Role::Embedding => return "model.word_embeddings.weight".to_string(),
            Role::Layer(layer, of) => (layer, of),
            role => return names::tensor_name(role),
        };
        let name = match of {
            LayerRole::Qkv => "attention.query_key_value.weight",
            LayerRole::Output => "attention.dense.weight",
            LayerRole::QueryNorm => "attention.query_layernorm.weight",
            LayerRole::KeyNorm => "attention.key_layernorm.weight",
            LayerRole::CorrectionBias => "mlp.gate.expert_bias",
            _ => return names::shared_experts(role),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_experts", "num_local_experts"]
    }
}
