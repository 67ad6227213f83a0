//! Qwen2-MoE and Qwen1.5-MoE: biased q/k/v projections, and a shared expert with a sigmoid gate beside the routed ones.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, Routing, RoutingKind, SharedExpert};
use crate::family::{CONFIG, Family};
use crate::json::Fields;

use super::{read, rope};

/// The family `qwen2_moe`.
pub(crate) struct Qwen2Moe;

impl Family for Qwen2Moe {
    fn model_type(&self) -> &'static str {
        "qwen2_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = sliding_windows(&config, read::num_layers(&config)?)?;
        let shared =
            SharedExpert { gated: true, ..SharedExpert::new(read::size(&config, "shared_expert_intermediate_size")?) };
        let layers =
            read::SparseLayers { expert_count_keys: self.expert_count_keys(), windows: &windows, shared: Some(shared) };
        let (layers, top_k) = layers.read(&config)?;
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(false);
        let attention = AttentionConfig { qkv_bias: config.bool("qkv_bias")?.unwrap_or(true), ..plain };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { llama3: true, ..rope::Dialect::new(max_position) })?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize }),
            layers,
        };
        model.read(&config, generation)
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}

/// The window of every layer.
///
/// - With `layer_types` (always written by transformers 5): the layers called `sliding_attention`.
/// - Without (transformers 4): all layers. `max_window_layers` chooses nothing there: transformers 4.57 builds one mask
///   for the whole model and gives it to every layer, whatever that field says.
///
/// Transformers 5 reads a config without `layer_types` in a third way (every other layer below `max_window_layers`).
/// The version that wrote such a file is followed, since that is the one the model was run with.
fn sliding_windows(config: &Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = read::window(config)?;
    let Some(types) = config.list("layer_types")? else { return Ok(vec![window; layers]) };
    if types.len() != layers {
        return Err(
            config.invalid("layer_types", format!("`num_hidden_layers` = {layers} entries, not {}", types.len()))
        );
    }
    let slides = |layer_type: &Value| match layer_type.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => Err(config.invalid(
            "sliding_window",
            "a window and `use_sliding_window`: true, since `layer_types` has sliding layers",
        )),
        _ => Err(config.invalid("layer_types", "a list of \"full_attention\" and \"sliding_attention\"")),
    };
    types.iter().map(slides).collect()
}
