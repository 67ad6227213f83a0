//! JetMoE: a mixture of attention heads beside the usual mixture of feed-forward experts, top-k and then softmax.

use serde_json::Value;

use crate::Result;
use crate::config::{HeadMixture, Mixer, ModelConfig, Routing, RoutingKind};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `jetmoe`.
pub(crate) struct JetMoe;

impl Family for JetMoe {
    fn model_type(&self) -> &'static str {
        "jetmoe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let (mut layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        let experts = read::experts_of(&layers);
        let (kv_heads, head_dim) = (read::size(&config, "num_key_value_heads")?, read::size(&config, "kv_channels")?);
        if !head_dim.is_multiple_of(2) {
            return Err(config.invalid("kv_channels", "an even width of a head, which the rotary embedding needs"));
        }
        let mixture = HeadMixture { experts, top_k, kv_heads, head_dim };
        for layer in &mut layers {
            layer.mixer = Mixer::HeadMixture(mixture.clone());
            if let crate::Ffn::Moe(moe) = &mut layer.ffn {
                moe.output_bias = true;
            }
        }
        let model = read::Model {
            model_type: self.model_type(),
            // Of the heads of one token: those of all its experts.
            attention: read::grouped_attention(top_k * kv_heads, kv_heads, head_dim),
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing: Routing::new(top_k, RoutingKind::TopKSoftmax),
            layers,
        };
        Ok(ModelConfig {
            hidden_act: read::activation_of(&config, "activation_function", "silu")?,
            // In layers transformers takes this, whatever `rms_norm_eps` says.
            norm_eps: 1e-6,
            final_norm_eps: Some(config.positive_float("rms_norm_eps")?.unwrap_or(1e-6)),
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(true),
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::Router) => format!("model.layers.{layer}.mlp.router.layer.weight"),
            role => names::tensor_name(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        match tensor {
            ExpertTensor::FusedGateUp => format!("model.layers.{layer}.mlp.input_linear.weight"),
            ExpertTensor::FusedDown => format!("model.layers.{layer}.mlp.output_linear.weight"),
            tensor => names::expert_tensor_name(layer, tensor),
        }
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Fused, ExpertLayout::PerExpert, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Fused
    }

    fn expert_matrices_are_modules(&self) -> bool {
        true
    }

    fn attention_has_experts(&self) -> bool {
        true
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
