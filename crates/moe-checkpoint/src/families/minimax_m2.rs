//! MiniMax-M2: norms over the whole query and key, a part of the head rotated, sigmoid routing with correction bias.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `minimax_m2`.
pub(crate) struct MiniMaxM2;

impl Family for MiniMaxM2 {
    fn model_type(&self) -> &'static str {
        "minimax_m2"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        let attention = AttentionConfig {
            rotary_dim: rope::rotary_dim(&config, plain.head_dim, 1.0)?,
            qk_norm: QkNorm::Projection,
            ..plain
        };
        let dialect = rope::Dialect { partial: true, theta: 5_000_000.0, ..rope::Dialect::new(max_position) };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &dialect)?,
            routing: Routing::new(
                top_k,
                RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None },
            ),
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::CorrectionBias) => {
                format!("model.layers.{layer}.block_sparse_moe.e_score_correction_bias")
            }
            role => names::block_sparse(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::block_sparse_expert(layer, tensor)
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
