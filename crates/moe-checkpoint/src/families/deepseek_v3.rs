//! DeepSeek-V3, and Kimi-K2, Moonlight and GLM-4.7-Flash, which are the same: latent attention, sigmoid routing with
//! correction bias. DeepSeek-V3.2 and GLM-5 have an indexer besides, which chooses the keys that a query sees. It
//! changes nothing in texts that are no longer than the number of keys it may choose.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, AttentionKind, KeySelection, ModelConfig};
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
    /// The indexer that chooses keys, where there is one.
    pub indexer: Option<Indexer>,
}

/// What differs between the indexers of families.
pub(crate) struct Indexer {
    /// Heads where a config says nothing.
    heads: usize,
    /// Whether neighboring columns are rotated together.
    interleaved: bool,
    /// Whether layers may take the keys that a layer before them chose.
    shares: bool,
}

impl Indexer {
    /// That of DeepSeek-V3.2.
    pub const DEEPSEEK: Self = Self { heads: 64, interleaved: false, shares: false };
    /// That of GLM-5.
    pub const GLM: Self = Self { heads: 32, interleaved: true, shares: true };

    fn read(&self, config: &Fields<'_>, layers: usize) -> Result<KeySelection> {
        let own = if self.shares { own_indexers(config, layers)? } else { vec![true; layers] };
        let mut chosen_by = Vec::with_capacity(layers);
        for (layer, own) in own.into_iter().enumerate() {
            chosen_by.push(if own { layer } else { chosen_by.last().copied().unwrap_or(layer) });
        }
        Ok(KeySelection {
            keys: config.integer("index_topk", 1, MAX_SIZE)?.unwrap_or(2048),
            heads: config.integer("index_n_heads", 1, MAX_SIZE)?.unwrap_or(self.heads),
            head_dim: config.integer("index_head_dim", 1, MAX_SIZE)?.unwrap_or(128),
            interleaved: self.interleaved,
            chosen_by,
        })
    }
}

/// Which layers have an indexer of their own: as `indexer_types` lists them, else by the letters of
/// `index_topk_pattern`, else every `index_topk_freq`-th from `index_skip_topk_offset` on.
fn own_indexers(config: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
    let own: (&str, Vec<bool>) = if config.value("indexer_types").is_some() {
        let words = read::layer_words(config, "indexer_types", layers, &["full", "shared"])?.unwrap_or_default();
        ("indexer_types", words.into_iter().map(|word| word == 0).collect())
    } else if let Some(Value::Array(_)) = config.value("index_topk_pattern") {
        let words = read::layer_words(config, "index_topk_pattern", layers, &["full", "shared"])?.unwrap_or_default();
        ("index_topk_pattern", words.into_iter().map(|word| word == 0).collect())
    } else if let Some(pattern) = config.string("index_topk_pattern")? {
        let known = pattern.chars().all(|letter| matches!(letter, 'F' | 'S'));
        if !known || pattern.chars().count() != layers {
            return Err(
                config.invalid("index_topk_pattern", format!("one letter, F or S, for each of {layers} layers"))
            );
        }
        ("index_topk_pattern", pattern.chars().map(|letter| letter == 'F').collect())
    } else {
        let every = config.integer("index_topk_freq", 0, MAX_SIZE)?.unwrap_or(1).max(1);
        let offset = config.integer("index_skip_topk_offset", 0, MAX_SIZE)?.unwrap_or(2);
        let is_own = |layer: usize| (layer + 1).saturating_sub(offset).is_multiple_of(every);
        ("index_topk_freq", (0..layers).map(is_own).collect())
    };
    match own.1.first() {
        Some(false) => Err(config.invalid(own.0, "an indexer in the first layer, which has no layer before it")),
        _ => Ok(own.1),
    }
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
        let selects = self.indexer.as_ref().map(|indexer| indexer.read(&config, layers.len())).transpose()?;
        let attention = AttentionConfig { selects, ..latent::read(&config, &rope)? };
        if let (Some(selection), AttentionKind::Latent(latent)) = (&attention.selects, &attention.kind) {
            if latent.q_lora_rank.is_none() {
                return Err(config.missing("q_lora_rank", "the rank of the latent of queries, which the indexer reads"));
            }
            if selection.head_dim < latent.qk_rope_head_dim {
                let expected = format!("at least `qk_rope_head_dim` = {}", latent.qk_rope_head_dim);
                return Err(config.invalid("index_head_dim", expected));
            }
        }
        let model = read::Model { model_type: self.model_type(), attention, rope, routing, layers };
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
