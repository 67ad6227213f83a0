//! Sarvam, and Ling and Ring with full attention: GLM-4.5 by other names, with the projections of queries, keys and
//! values in one matrix. The first Ling models choose experts by a softmax instead.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::Renormalize;
use super::{names, read, rope};

/// The families `sarvam_moe`, `bailing_moe` and `bailing_moe_v2`.
pub(crate) struct SarvamMoe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether it is Ling or Ring, whose configs say more and have other defaults. Those of the second version may call
    /// themselves by the name of the first.
    pub bailing: bool,
}

impl SarvamMoe {
    /// Whether experts are chosen by sigmoids with a correction bias rather than by a softmax.
    fn corrects(&self, config: &Fields<'_>) -> Result<bool> {
        if !self.bailing {
            return Ok(true);
        }
        let mut found = None;
        for key in ["score_function", "scoring_func"] {
            let sigmoid = match config.string(key)? {
                None => continue,
                Some("sigmoid") => true,
                Some("softmax") => false,
                Some(_) => return Err(config.invalid(key, "\"sigmoid\" or \"softmax\"")),
            };
            if found.is_some_and(|found| found != sigmoid) {
                return Err(config.invalid(key, "what score_function says"));
            }
            found = Some(sigmoid);
        }
        let bias = config.bool("moe_router_enable_expert_bias")?;
        if let (Some(sigmoid), Some(bias)) = (found, bias)
            && sigmoid != bias
        {
            return Err(config.invalid("moe_router_enable_expert_bias", "true with sigmoids, false with a softmax"));
        }
        Ok(found.or(bias).unwrap_or(self.model_type == "bailing_moe_v2"))
    }
}

impl Family for SarvamMoe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let shared_count_key = match config.value("n_shared_experts") {
            Some(_) => "n_shared_experts",
            None => "num_shared_experts",
        };
        let dense = if self.bailing { 0 } else { 1 };
        let (layers, routing) = match self.corrects(&config)? {
            true => {
                let moe = read::Corrected {
                    expert_count_keys: self.expert_count_keys(),
                    shared_count_key,
                    dense,
                    windows: &windows,
                    renormalize: Renormalize::Default(true),
                    scale: ("routed_scaling_factor", 2.5),
                };
                moe.read(&config)?
            }
            false => {
                let keys = self.expert_count_keys();
                let (layers, top_k) = read::dense_then_moe(&config, keys, shared_count_key, dense, &windows)?;
                let renormalize = Renormalize::Default(false).read(&config)?;
                let scale = read::scaling(&config, ("routed_scaling_factor", 1.0))?;
                (layers, Routing { scale, ..Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize }) })
            }
        };
        let plain = read::attention(&config)?;
        let qk_norm = match config.bool("use_qk_norm")?.unwrap_or(!self.bailing) {
            true => QkNorm::Head,
            false => QkNorm::None,
        };
        for (key, what) in [
            ("norm_head", "heads whose columns are normalized are not supported; false"),
            ("norm_softmax", "logits that are normalized are not supported; false"),
            ("multi_gate", "a router for every kind of input is not supported; false"),
        ] {
            if config.bool(key)?.unwrap_or(false) {
                return Err(config.invalid(key, what));
            }
        }
        for key in ["attention_bias", "use_qkv_bias", "use_bias"] {
            if config.bool(key)?.unwrap_or(false) {
                return Err(config.invalid(key, "false, as in all released models"));
            }
        }
        let attention = AttentionConfig {
            rotary_dim: rope::rotary_dim(&config, plain.head_dim, 1.0)?,
            qk_norm,
            packed: true,
            ..plain
        };
        let dialect = rope::Dialect { partial: true, ..rope::Dialect::new(max_position) };
        let rope = rope::read(&config, &dialect)?;
        let model = read::Model { model_type: self.model_type(), attention, rope, routing, layers };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        let (layer, of) = match role {
            Role::Embedding => return "model.word_embeddings.weight".to_string(),
            Role::Layer(layer, of) => (layer, of),
            role => return names::tensor_name(role),
        };
        let name = match of {
            LayerRole::Qkv => "attention.query_key_value.weight",
            LayerRole::Output => "attention.dense.weight",
            LayerRole::QueryNorm => "attention.query_layernorm.weight",
            LayerRole::KeyNorm => "attention.key_layernorm.weight",
            LayerRole::CorrectionBias => "mlp.gate.expert_bias",
            _ => return names::shared_experts(role),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some(if self.bailing { "num_shared_experts" } else { "n_shared_experts" })
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        match self.bailing {
            true => &["num_experts", "n_routed_experts"],
            false => &["n_routed_experts", "num_experts", "num_local_experts"],
        }
    }
}
