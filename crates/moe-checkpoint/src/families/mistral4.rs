//! Mistral 4: latent attention whose queries grow with their position, softmax routing, a shared expert, fused experts.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, GroupScore, ModelConfig, QueryGrowth, RopeScaling, Routing, RoutingKind};
use crate::experts::ExpertLayout;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{latent, names, read, rope};

/// The family `mistral4`.
pub(crate) struct Mistral4;

impl Family for Mistral4 {
    fn model_type(&self) -> &'static str {
        "mistral4"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let interleaved = config.bool("rope_interleave")?.unwrap_or(true);
        let dialect = rope::Dialect { interleaved, partial: true, ..rope::Dialect::new(max_position) };
        let rope = rope::read(&config, &dialect)?;
        let (layers, top_k) = read::first_dense(&config, self.expert_count_keys(), "n_shared_experts")?;
        if read::groups(&config, read::experts_of(&layers), top_k, GroupScore::TopTwoSum)?.is_some() {
            return Err(config.invalid("n_group", "1, as in all released models"));
        }
        let rate = match config.object("rope_parameters")? {
            Some(parameters) => parameters.float("llama_4_scaling_beta")?,
            None => None,
        };
        let growth = match (rate, &rope.scaling) {
            (Some(rate), RopeScaling::Yarn { original_max_position, .. }) => {
                Some(QueryGrowth { rate, length: *original_max_position, offset: 0 })
            }
            (Some(_), _) => {
                let expected = "YaRN with `original_max_position_embeddings`, since there is a `llama_4_scaling_beta`";
                return Err(config.invalid("rope_parameters", expected));
            }
            (None, _) => None,
        };
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(true);
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { growth, ..latent::read(&config, &rope)? },
            rope,
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 1.0))?,
                ..Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize })
            },
            layers,
        };
        model.read(&config, generation)
    }

    fn tensor_name(&self, role: Role) -> String {
        names::shared_experts(role)
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Fused
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("n_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }
}
