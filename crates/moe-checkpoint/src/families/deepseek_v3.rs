//! DeepSeek-V3, and Kimi-K2, Moonlight and GLM-4.7-Flash, which are the same: latent attention, sigmoid routing with
//! correction bias. DeepSeek-V3.2 and GLM-5 have an indexer besides, which chooses the keys that a query sees. It
//! changes nothing in texts that are no longer than the number of keys it may choose; those are the texts that run.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig};
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::read::{MAX_SIZE, Renormalize};
use super::{latent, names, read, rope};

/// The family `deepseek_v3`, under any of its names.
pub(crate) struct DeepseekV3 {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Dense layers before the first MoE layer where a config says nothing.
    pub dense: usize,
    /// Whether an indexer chooses keys.
    pub indexer: bool,
}

impl Family for DeepseekV3 {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let interleaved = config.bool("rope_interleave")?.unwrap_or(true);
        let rope = rope::read(&config, &rope::Dialect { interleaved, ..rope::Dialect::new(max_position) })?;
        let windows = vec![None; read::num_layers(&config)?];
        let moe = read::Corrected {
            expert_count_keys: self.expert_count_keys(),
            shared_count_key: "n_shared_experts",
            dense: self.dense,
            windows: &windows,
            renormalize: Renormalize::Default(true),
            scale: ("routed_scaling_factor", 1.0),
        };
        let (layers, routing) = moe.read(&config)?;
        for (key, only) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
            if config.string(key)?.is_some_and(|found| found != only) {
                return Err(config.invalid(key, format!("\"{only}\"")));
            }
        }
        let selects = match self.indexer {
            true => Some(config.integer("index_topk", 1, MAX_SIZE)?.unwrap_or(2048)),
            false => None,
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { selects, ..latent::read(&config, &rope)? },
            rope,
            routing,
            layers,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::shared_experts(role)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }
}
