//! dots.llm1: norms per head, dense first layers, shared experts, sigmoid routing with correction bias; windows in the
//! last layers.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm};
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::read::Renormalize;
use super::{names, read, rope};

/// The family `dots1`.
pub(crate) struct Dots1;

impl Family for Dots1 {
    fn model_type(&self) -> &'static str {
        "dots1"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let first_sliding = config.integer("max_window_layers", 0, read::MAX_SIZE)?.unwrap_or(62);
        let windows = read::typed_windows(&config, |layer| layer >= first_sliding)?;
        let moe = read::Corrected {
            expert_count_keys: self.expert_count_keys(),
            shared_count_key: "n_shared_experts",
            dense: 0,
            windows: &windows,
            renormalize: Renormalize::Default(false),
            scale: ("routed_scaling_factor", 1.0),
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
        names::shared_experts(role)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }
}
