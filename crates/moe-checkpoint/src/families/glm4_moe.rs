//! GLM-4.5, and the text model of GLM-4.5V: sigmoid routing with correction bias, a part of the head rotated, dense
//! first layers.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm};
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::read::Renormalize;
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
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let moe = read::Corrected {
            expert_count_keys: self.expert_count_keys(),
            shared_count_key: "n_shared_experts",
            dense: 0,
            windows: &windows,
            renormalize: Renormalize::Default(true),
            scale: ("routed_scaling_factor", 1.0),
        };
        let (layers, routing) = moe.read(&config)?;
        let qk_norm = match config.bool("use_qk_norm")?.unwrap_or(false) {
            true => QkNorm::Head,
            false => QkNorm::None,
        };
        let attention = AttentionConfig {
            rotary_dim: rope::rotary_dim(&config, plain.head_dim, 0.5)?,
            // The output projection never has a bias.
            qkv_bias: config.bool("attention_bias")?.unwrap_or(self.attention_bias),
            qk_norm,
            ..plain
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { partial: true, ..rope::Dialect::new(max_position) })?,
            routing,
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::shared_experts(role)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }
}
