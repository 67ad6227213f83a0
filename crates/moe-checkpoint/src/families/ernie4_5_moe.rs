//! Ernie 4.5: softmax routing selected with a correction bias, neighboring dimensions rotated together.

use serde_json::Value;

use crate::Result;
use crate::config::{ModelConfig, Routing, RoutingKind};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `ernie4_5_moe`.
pub(crate) struct Ernie45Moe;

impl Family for Ernie45Moe {
    fn model_type(&self) -> &'static str {
        "ernie4_5_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        if config.bool("use_bias")?.unwrap_or(false) {
            return Err(config.invalid("use_bias", "false, as in all released models: biases are not supported"));
        }
        let layers = read::num_layers(&config)?;
        let index = |key: &str, default: usize| match config.value(key).and_then(Value::as_i64) {
            Some(-1) => Ok(layers - 1),
            _ => Ok::<_, crate::Error>(config.integer(key, 0, read::MAX_SIZE)?.unwrap_or(default)),
        };
        let (start, end) = (index("moe_layer_start_index", 1)?, index("moe_layer_end_index", layers - 1)?);
        let interval = config.integer("moe_layer_interval", 1, read::MAX_SIZE)?.unwrap_or(1);
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: self.top_k_keys()[0],
            width_key: "moe_intermediate_size",
            bias: false,
            shared: read::shared_experts(&config, "moe_num_shared_experts")?,
            is_moe: (0..layers).map(|i| (i + 1) % interval == 0 && (start..=end).contains(&i)).collect(),
            why: format!(
                "`moe_layer_start_index` {start}, `moe_layer_end_index` {end}, `moe_layer_interval` {interval}"
            ),
            windows: &vec![None; layers],
        };
        let (layers, top_k) = moe.read(&config)?;
        let norm_min = config.positive_float("moe_norm_min")?.unwrap_or(1e-12);
        let dialect = rope::Dialect { theta: 500_000.0, interleaved: true, ..rope::Dialect::new(max_position) };
        let model = read::Model {
            model_type: self.model_type(),
            attention: plain,
            rope: rope::read(&config, &dialect)?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxCorrected { norm_min: Some(norm_min) }),
            layers,
        };
        let tie_word_embeddings = config.bool("tie_word_embeddings")?.unwrap_or(true);
        Ok(ModelConfig { tie_word_embeddings, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::CorrectionBias) => {
                format!("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias")
            }
            role => names::shared_experts(role),
        }
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("moe_num_shared_experts")
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["moe_k"]
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["moe_num_experts", "num_experts"]
    }
}
