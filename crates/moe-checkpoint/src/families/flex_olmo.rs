//! FlexOlmo: norms after both halves of a layer instead of before them, norms over the whole query and key, softmax
//! routing.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, NormPlacement, QkNorm, Routing, RoutingKind};
use crate::family::{CONFIG, Family};
use crate::json::Fields;

use super::{read, rope};

/// The family `flex_olmo`.
pub(crate) struct FlexOlmo;

impl Family for FlexOlmo {
    fn model_type(&self) -> &'static str {
        "flex_olmo"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(false);
        let plain = read::attention(&config)?;
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { qkv_bias: bias, output_bias: bias, qk_norm: QkNorm::Projection, ..plain },
            rope: rope::read(&config, &rope::Dialect { theta: 500_000.0, ..rope::Dialect::new(max_position) })?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize }),
            layers,
        };
        Ok(ModelConfig { placement: NormPlacement::After, ..model.read(&config, generation)? })
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
