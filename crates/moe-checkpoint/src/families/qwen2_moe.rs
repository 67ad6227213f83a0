//! Qwen2-MoE and Qwen1.5-MoE: biased q/k/v projections, and a shared expert with a sigmoid gate beside the routed ones.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, Multipliers, NormKind, QkNorm, Routing, RoutingKind, SharedExpert};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `qwen2_moe`.
pub(crate) struct Qwen2Moe;

impl Family for Qwen2Moe {
    fn model_type(&self) -> &'static str {
        "qwen2_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let (num_heads, num_kv_heads, head_dim) = read::heads(&config, hidden_size)?;
        let max_position_embeddings = read::size(&config, "max_position_embeddings")?;
        let windows = sliding_windows(&config, read::num_layers(&config)?)?;
        let shared =
            SharedExpert { intermediate_size: read::size(&config, "shared_expert_intermediate_size")?, gated: true };
        let layers =
            read::SparseLayers { expert_count_keys: self.expert_count_keys(), windows: &windows, shared: Some(shared) };
        let (layers, top_k) = layers.read(&config)?;
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(false);
        Ok(ModelConfig {
            model_type: self.model_type().to_string(),
            hidden_size,
            vocab_size: read::size(&config, "vocab_size")?,
            norm: NormKind::Rms,
            norm_eps: read::norm_eps(&config)?,
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(false),
            max_position_embeddings,
            head_bias: false,
            multipliers: Multipliers::default(),
            mtp_layers: 0,
            hidden_act: read::activation(&config)?,
            attention: AttentionConfig {
                qkv_bias: config.bool("qkv_bias")?.unwrap_or(true),
                output_bias: false,
                qk_norm: QkNorm::None,
                ..read::grouped_attention(num_heads, num_kv_heads, head_dim)
            },
            rope: rope::read(&config, &rope::Dialect::new(max_position_embeddings))?,
            routing: Routing { top_k, kind: RoutingKind::SoftmaxTopK { renormalize }, scale: 1.0, bias: false },
            layers,
            quantization: read::quantization(&config)?,
            eos_token_ids: read::eos_token_ids(&config, generation)?,
            dtype: read::dtype(&config)?,
        })
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

/// The window of every layer.
///
/// - With `layer_types` (always written by transformers 5): the layers called `sliding_attention`.
/// - Without (transformers 4): all layers. `max_window_layers` chooses nothing there: transformers 4.57 builds one mask
///   for the whole model and gives it to every layer, whatever that field says.
///
/// Transformers 5 reads a config without `layer_types` in a third way (every other layer below `max_window_layers`). The
/// version that wrote such a file is followed, since that is the one the model was run with.
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
