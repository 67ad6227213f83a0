//! DeepSeek-V2: latent attention, softmax routing without renormalization, optionally limited to groups.

use serde_json::Value;

use crate::Result;
use crate::config::{GroupScore, ModelConfig, Routing, RoutingKind};
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{latent, names, read, rope};

/// The family `deepseek_v2`.
pub(crate) struct DeepseekV2;

impl Family for DeepseekV2 {
    fn model_type(&self) -> &'static str {
        "deepseek_v2"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        // Neighboring dimensions are turned together, as complex numbers.
        let rope = rope::read(&config, &rope::Dialect { interleaved: true, ..rope::Dialect::new(max_position) })?;
        let (layers, top_k) = read::first_dense(&config, self.expert_count_keys(), "n_shared_experts")?;
        if config.bool("norm_topk_prob")?.unwrap_or(false) {
            // The original code renormalizes then; transformers does not.
            return Err(config.invalid("norm_topk_prob", "false, since implementations of DeepSeek-V2 disagree on it"));
        }
        let groups = read::groups(&config, read::experts_of(&layers), top_k, GroupScore::Max)?;
        let kind = match (config.string("topk_method")?.unwrap_or("greedy"), groups) {
            ("greedy", _) | ("group_limited_greedy", None) => RoutingKind::SoftmaxTopK { renormalize: false },
            ("group_limited_greedy", Some(groups)) => RoutingKind::SoftmaxGroupTopK { groups },
            _ => return Err(config.invalid("topk_method", "\"greedy\" or \"group_limited_greedy\"")),
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention: latent::read(&config, &rope)?,
            rope,
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 1.0))?,
                ..Routing::new(top_k, kind)
            },
            layers,
        };
        model.read(&config, generation)
    }

    fn tensor_name(&self, role: Role) -> String {
        names::shared_experts(role)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_experts"]
    }
}
