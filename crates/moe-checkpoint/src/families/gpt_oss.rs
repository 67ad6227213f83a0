//! gpt-oss: attention sinks, alternating windows, biases everywhere, clamped SwiGLU, interleaved experts.

use serde_json::Value;

use crate::Result;
use crate::config::{Activation, AttentionConfig, ModelConfig, Routing, RoutingKind};
use crate::experts::ExpertLayout;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `gpt_oss`.
pub(crate) struct GptOss;

impl Family for GptOss {
    fn model_type(&self) -> &'static str {
        "gpt_oss"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = windows(&config, read::num_layers(&config)?)?;
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), true, &windows)?;
        let attention_bias = config.bool("attention_bias")?.unwrap_or(true);
        let attention = AttentionConfig { qkv_bias: attention_bias, output_bias: attention_bias, sinks: true, ..plain };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { theta: 150_000.0, ..rope::Dialect::new(max_position) })?,
            routing: Routing { bias: true, ..Routing::new(top_k, RoutingKind::TopKSoftmax) },
            layers,
        };
        let hidden_act = Activation::ClampedSwiglu {
            alpha: config.positive_float("swiglu_alpha")?.unwrap_or(1.702),
            limit: config.positive_float("swiglu_limit")?.unwrap_or(7.0),
        };
        Ok(ModelConfig { hidden_act, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::Router) => format!("model.layers.{layer}.mlp.router.weight"),
            Role::Layer(layer, LayerRole::RouterBias) => format!("model.layers.{layer}.mlp.router.bias"),
            role => names::tensor_name(role),
        }
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Interleaved, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Interleaved
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["num_experts_per_tok", "experts_per_token"]
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}

/// Windows of the layers: `layer_types`, by default sliding and full in turn.
fn windows(config: &Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = config.integer("sliding_window", 0, read::MAX_SIZE)?.filter(|window| *window > 0);
    let expected = || format!("a list of {layers} of \"full_attention\" and \"sliding_attention\"");
    let types = match config.value("layer_types") {
        None => return Ok((0..layers).map(|layer| window.filter(|_| layer % 2 == 0)).collect()),
        Some(Value::Array(types)) if types.len() == layers => types,
        Some(_) => return Err(config.invalid("layer_types", expected())),
    };
    let window = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Ok(window),
        Some("full_attention") => Ok(None),
        _ => Err(config.invalid("layer_types", expected())),
    };
    types.iter().map(window).collect()
}
