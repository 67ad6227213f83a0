//! GraniteMoE, with and without a shared expert: constant multipliers on embedding, residual stream, attention and logits; fused experts.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, Multipliers, Routing, RoutingKind, SharedExpert};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The families `granitemoe` and `granitemoeshared`.
pub(crate) struct GraniteMoe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether there may be a shared expert.
    pub shared: bool,
}

impl Family for GraniteMoe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let width = match self.shared {
            true => config.integer("shared_intermediate_size", 0, read::MAX_SIZE)?.unwrap_or(1024),
            false => 0,
        };
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared: (width > 0).then(|| SharedExpert { packed: true, ..SharedExpert::new(width) }),
            is_moe: vec![true; windows.len()],
            why: "no expert".to_string(),
            windows: &windows,
        };
        let (layers, top_k) = moe.read(&config)?;
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
            Role::Layer(layer, LayerRole::SharedDown) => {
                format!("model.layers.{layer}.shared_mlp.output_linear.weight")
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
