//! AFMoE (Trinity): norms before and after both halves of a layer, gates on the heads, rotation in layers with a window
//! only, sigmoid routing with correction bias.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, ModelConfig, Multipliers, NormPlacement, OutputGate, QkNorm, Routing, RoutingKind,
};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read, rope};

/// The family `afmoe`.
pub(crate) struct Afmoe;

impl Family for Afmoe {
    fn model_type(&self) -> &'static str {
        "afmoe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let every = config.integer("global_attn_every_n_layers", 1, MAX_SIZE)?.unwrap_or(4);
        let windows = read::typed_windows(&config, |layer| !(layer + 1).is_multiple_of(every))?;
        let dense = config.integer("num_dense_layers", 0, MAX_SIZE)?.unwrap_or(1);
        for (key, only) in [("score_func", "sigmoid")] {
            if config.string(key)?.is_some_and(|found| found != only) {
                return Err(config.invalid(key, format!("\"{only}\"")));
            }
        }
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared: read::shared_experts(&config, "num_shared_experts")?,
            is_moe: (0..windows.len()).map(|layer| layer >= dense).collect(),
            why: format!("`num_dense_layers` {dense}"),
            windows: &windows,
        };
        let (mut layers, top_k) = moe.read(&config)?;
        layers.iter_mut().for_each(|layer| layer.rotary = layer.sliding_window.is_some());
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let attention = AttentionConfig {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: QkNorm::Head,
            gate: OutputGate::Projection,
            ..read::attention(&config)?
        };
        let kind = RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing: Routing { scale: read::scaling(&config, ("route_scale", 1.0))?, ..Routing::new(top_k, kind) },
            layers,
        };
        let embedding = match config.bool("mup_enabled")?.unwrap_or(false) {
            true => (hidden_size as f64).sqrt(),
            false => 1.0,
        };
        Ok(ModelConfig {
            placement: NormPlacement::Both,
            multipliers: Multipliers { embedding, ..Multipliers::default() },
            norm_eps: config.positive_float("rms_norm_eps")?.unwrap_or(1e-5),
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        let Role::Layer(layer, of) = role else { return names::tensor_name(role) };
        let name = match of {
            LayerRole::FfnNorm => "pre_mlp_layernorm.weight",
            LayerRole::FfnOutputNorm => "post_mlp_layernorm.weight",
            LayerRole::Router => "mlp.router.gate.weight",
            LayerRole::CorrectionBias => "mlp.expert_bias",
            _ => return names::shared_experts(role),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
