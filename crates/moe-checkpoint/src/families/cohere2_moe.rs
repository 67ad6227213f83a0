//! Cohere 2 with experts: attention and feed-forward half side by side behind one norm, layers with a window that alone
//! rotate, dense first layers with a width of their own, experts chosen by their logits.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, Ffn, ModelConfig, Multipliers, NormKind, NormPlacement, Routing, RoutingKind, SharedExpert,
};
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read, rope};

/// The family `cohere2_moe`.
pub(crate) struct Cohere2Moe;

/// Every so many layers, the last one has no window, where a config does not list them.
const PATTERN: usize = 4;

impl Cohere2Moe {
    /// Dense first layers: `mlp_layer_types`, or `first_k_dense_replace`.
    fn dense(config: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
        let first = config.integer("first_k_dense_replace", 0, MAX_SIZE)?.unwrap_or(0);
        let words = read::layer_words(config, "mlp_layer_types", layers, &["dense", "sparse"])?;
        Ok(words.map_or_else(
            || (0..layers).map(|layer| layer < first).collect(),
            |words| words.into_iter().map(|word| word == 0).collect(),
        ))
    }

    /// The shared experts, stored as one.
    fn shared(config: &Fields<'_>, width: usize) -> Result<Option<SharedExpert>> {
        let averaged = match config.string("shared_expert_combination_strategy")?.unwrap_or("average") {
            "average" => true,
            "sum" => false,
            _ => return Err(config.invalid("shared_expert_combination_strategy", "\"average\" or \"sum\"")),
        };
        let count = config.integer("num_shared_experts", 0, MAX_SIZE)?.unwrap_or(0);
        let width = count.checked_mul(width).filter(|width| *width <= MAX_SIZE).ok_or_else(|| {
            let expected = format!("a product with `intermediate_size` of at most {MAX_SIZE}");
            config.invalid("num_shared_experts", expected)
        })?;
        Ok((count > 0).then_some(SharedExpert { averaged, ..SharedExpert::new(width) }))
    }
}

impl Family for Cohere2Moe {
    fn model_type(&self) -> &'static str {
        "cohere2_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let layers = read::num_layers(&config)?;
        let dense = Self::dense(&config, layers)?;
        let first = dense.iter().take_while(|dense| **dense).count();
        let every =
            |key: &str, default: usize| Ok::<_, crate::Error>(config.integer(key, 1, MAX_SIZE)?.unwrap_or(default));
        let prefix = every("prefix_dense_sliding_window_pattern", 1)?;
        let pattern = every("sliding_window_pattern", PATTERN)?;
        let windows = read::typed_windows(&config, |layer| match layer < first {
            true => !(layer + 1).is_multiple_of(prefix),
            false => !(layer - first + 1).is_multiple_of(pattern),
        })?;
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared: Self::shared(&config, read::size(&config, self.width_key())?)?,
            is_moe: dense.iter().map(|dense| !dense).collect(),
            why: "`mlp_layer_types`, or `first_k_dense_replace`".to_string(),
            windows: &windows,
        };
        let (mut all, top_k) = moe.read(&config)?;
        let width = config.integer("prefix_dense_intermediate_size", 1, MAX_SIZE)?;
        for (layer, dense) in all.iter_mut().zip(&dense) {
            layer.rotary = layer.sliding_window.is_some() || (*dense && prefix == 1);
            if let (Ffn::Dense { intermediate_size, .. }, Some(width)) = (&mut layer.ffn, width) {
                *intermediate_size = width;
            }
        }
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(true);
        let kind = match config.string("expert_selection_fn")?.unwrap_or("softmax") {
            "softmax" => RoutingKind::TopKSoftmax,
            "sigmoid" => RoutingKind::Sigmoid { renormalize, correction_bias: false, groups: None },
            _ => return Err(config.invalid("expert_selection_fn", "\"softmax\" or \"sigmoid\"")),
        };
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let dialect = rope::Dialect { interleaved: true, ..rope::Dialect::new(max_position) };
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { qkv_bias: bias, output_bias: bias, ..read::attention(&config)? },
            rope: rope::read(&config, &dialect)?,
            routing: Routing { norm_eps: 0.0, ..Routing::new(top_k, kind) },
            layers: all,
        };
        let (norm, norm_eps) = match config.positive_float("rms_norm_eps")? {
            Some(eps) => (NormKind::Rms, eps),
            None => (NormKind::LayerUnbiased, config.positive_float("layer_norm_eps")?.unwrap_or(1e-5)),
        };
        let logits_divisor = 1.0 / config.positive_float("logit_scale")?.unwrap_or(0.0625);
        Ok(ModelConfig {
            norm,
            norm_eps,
            placement: NormPlacement::Parallel,
            multipliers: Multipliers { logits_divisor, ..Multipliers::default() },
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(true),
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::shared_experts(role)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
