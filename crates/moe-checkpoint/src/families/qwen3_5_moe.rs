//! Qwen3.5-MoE: the routed experts of the text model. Attention (in most layers a linear one) is not described, so that such
//! a checkpoint can be read, pruned and written, but not run.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, AttentionKind, ModelConfig, RopeConfig, RopeScaling, Routing, RoutingKind, SharedExpert,
};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read};

/// The family `qwen3_5_moe_text`.
pub(crate) struct Qwen35Moe;

impl Family for Qwen35Moe {
    fn model_type(&self) -> &'static str {
        "qwen3_5_moe_text"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let text = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&text, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&text, hidden_size)?;
        let windows = vec![None; read::num_layers(&text)?];
        let intermediate_size = read::size(&text, "shared_expert_intermediate_size")?;
        let shared = Some(SharedExpert { intermediate_size, gated: true });
        let layers = read::SparseLayers { expert_count_keys: self.expert_count_keys(), windows: &windows, shared };
        let (layers, top_k) = layers.read(&text)?;
        let attention = AttentionConfig {
            kind: AttentionKind::Other,
            ..read::grouped_attention(num_heads, num_kv_heads, head_dim)
        };
        let theta = match text.object("rope_parameters")? {
            Some(parameters) => parameters.positive_float("rope_theta")?,
            None => text.positive_float("rope_theta")?,
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: RopeConfig { theta: theta.unwrap_or(10_000.0), interleaved: false, scaling: RopeScaling::Default },
            routing: Routing { top_k, kind: RoutingKind::SoftmaxTopK { renormalise: true }, scale: 1.0, bias: false },
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&text)?, ..model.read(&text, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::tensor_name(role)
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor)
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        names::layer_of(name)
    }

    fn width_key(&self) -> &'static str {
        "moe_intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }

    fn size_keys(&self, role: Role) -> &'static str {
        names::size_keys(role)
    }
}
