//! K-EXAONE: as dots.llm1, but only layers with a window rotate queries and keys, and best groups are selected first.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::Renormalize;
use super::{names, read, rope};

/// The family `exaone_moe`.
pub(crate) struct ExaoneMoe;

impl Family for ExaoneMoe {
    fn model_type(&self) -> &'static str {
        "exaone_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let pattern = config.integer("sliding_window_pattern", 1, read::MAX_SIZE)?.unwrap_or(4);
        let windows = read::typed_windows(&config, |layer| !(layer + 1).is_multiple_of(pattern))?;
        let moe = read::Corrected {
            expert_count_keys: self.expert_count_keys(),
            shared_count_key: "num_shared_experts",
            dense: 1,
            windows: &windows,
            renormalize: Renormalize::Default(true),
            scale: ("routed_scaling_factor", 2.5),
        };
        let (mut layers, routing) = moe.read(&config)?;
        // Without any window, all layers rotate.
        if windows.iter().any(Option::is_some) {
            layers.iter_mut().for_each(|layer| layer.rotary = layer.sliding_window.is_some());
        }
        let attention = AttentionConfig { qk_norm: QkNorm::Head, ..plain };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { theta: 1_000_000.0, ..rope::Dialect::new(max_position) })?,
            routing,
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

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
