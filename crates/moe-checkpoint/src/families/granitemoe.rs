//! GraniteMoE: constant multipliers on embedding, residual stream, attention and logits; fused experts.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, Multipliers, Routing, RoutingKind};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `granitemoe`.
pub(crate) struct GraniteMoe;

impl Family for GraniteMoe {
    fn model_type(&self) -> &'static str {
        "granitemoe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let factor = |key: &str| Ok::<_, crate::Error>(config.positive_float(key)?.unwrap_or(1.0));
        let attention = AttentionConfig {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            scale: Some(factor("attention_multiplier")?),
            ..plain
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing: Routing::new(top_k, RoutingKind::TopKSoftmax),
            layers,
        };
        let multipliers = Multipliers {
            embedding: factor("embedding_multiplier")?,
            residual: factor("residual_multiplier")?,
            logits_divisor: factor("logits_scaling")?,
        };
        Ok(ModelConfig { multipliers, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::Router) => {
                format!("model.layers.{layer}.block_sparse_moe.router.layer.weight")
            }
            role => names::tensor_name(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        match tensor {
            ExpertTensor::FusedGateUp => format!("model.layers.{layer}.block_sparse_moe.input_linear.weight"),
            ExpertTensor::FusedDown => format!("model.layers.{layer}.block_sparse_moe.output_linear.weight"),
            // One by one, as quantizers unroll them.
            tensor => names::expert_tensor_name(layer, tensor).replace(".mlp.", ".block_sparse_moe."),
        }
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Fused, ExpertLayout::PerExpert, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Fused
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
