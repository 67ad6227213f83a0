//! Kimi-Linear and Bailing hybrid (Ling, Ring): Kimi delta attention in most layers, latent attention in the others,
//! sigmoid routing with correction bias, shared experts, dense first layers.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, ChannelDelta, GroupScore, Mixer, ModelConfig, OutputGate, RopeConfig, RopeScaling, Routing,
    RoutingKind,
};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{latent, names, read, rope};

/// The families `kimi_linear` and `bailing_hybrid`.
pub(crate) struct KimiLinear {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether it is Bailing hybrid: latent attention rotates and has a gate per head, decays and output gates of
    /// linear attention have one projection each, and tensors have other names.
    pub bailing: bool,
}

impl KimiLinear {
    /// Linear attention, in the dialect of transformers (`linear_num_heads`) or of the release.
    fn delta(&self, config: &Fields<'_>) -> Result<ChannelDelta> {
        let inner = config.object("linear_attn_config")?;
        let size = |own: &str, inner_key: &str, other: &str, default: Option<usize>| {
            let inner = match &inner {
                Some(inner) => inner.integer(inner_key, 1, read::MAX_HEADS)?,
                None => None,
            };
            let found = config.integer(own, 1, read::MAX_HEADS)?.or(inner);
            match found.or(config.integer(other, 1, read::MAX_HEADS)?).or(default) {
                Some(size) => Ok(size),
                None => Err(config.missing(own, format!("a number, or `linear_attn_config.{inner_key}`"))),
            }
        };
        let lower_bound = match self.bailing && config.bool("kda_safe_gate")?.unwrap_or(true) {
            true => Some(config.float("kda_lower_bound")?.unwrap_or(-5.0)),
            false => None,
        };
        if lower_bound.is_some_and(|bound| bound >= 0.0) {
            return Err(config.invalid("kda_lower_bound", "a number below 0"));
        }
        Ok(ChannelDelta {
            heads: size("linear_num_heads", "num_heads", "num_attention_heads", None)?,
            head_dim: size("linear_head_dim", "head_dim", "head_dim", None)?,
            kernel: size("linear_conv_kernel_dim", "short_conv_kernel_size", "short_conv_kernel_size", Some(4))?,
            low_rank: !self.bailing,
            lower_bound,
        })
    }

    /// Whether each layer has latent attention: `layer_types`, the layers of `linear_attn_config`, counted from 1, or
    /// the last of every `layer_group_size`.
    fn attends(config: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
        if let Some(words) = read::layer_words(config, "layer_types", layers, &["linear_attention", "full_attention"])?
        {
            return Ok(words.into_iter().map(|word| word == 1).collect());
        }
        if let Some(inner) = config.object("linear_attn_config")? {
            let expected = "a list of layers, counted from 1";
            let full = inner.integers("full_attn_layers", 1, layers)?;
            let full = full.ok_or_else(|| inner.missing("full_attn_layers", expected))?;
            return Ok((1..=layers).map(|layer| full.contains(&layer)).collect());
        }
        let expected = "a list of \"linear_attention\" and \"full_attention\"";
        let every = config.integer("layer_group_size", 1, MAX_SIZE)?;
        let every = every.ok_or_else(|| config.missing("layer_types", expected))?;
        Ok((1..=layers).map(|layer| layer.is_multiple_of(every)).collect())
    }
}

impl Family for KimiLinear {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let layers = read::num_layers(&config)?;
        let default = if self.bailing { 2 } else { 0 };
        let dense = config.integer("first_k_dense_replace", 0, MAX_SIZE)?.unwrap_or(default);
        if config.integer("moe_layer_freq", 0, MAX_SIZE)?.is_some_and(|found| found != 1) {
            return Err(config.invalid("moe_layer_freq", "1, as in all released models"));
        }
        let words = read::layer_words(&config, "mlp_layer_types", layers, &["dense", "sparse"])?;
        // Either name of each key: transformers reads both.
        let named = |keys: &'static [&'static str]| {
            keys.iter().copied().find(|key| config.value(key).is_some()).unwrap_or(keys[0])
        };
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: named(self.top_k_keys()),
            width_key: "moe_intermediate_size",
            bias: false,
            shared: read::shared_experts(&config, "num_shared_experts")?,
            is_moe: match words {
                Some(words) => words.into_iter().map(|word| word == 1).collect(),
                None => (0..layers).map(|layer| layer >= dense).collect(),
            },
            why: format!("`mlp_layer_types`, or `first_k_dense_replace` {dense}"),
            windows: &vec![None; layers],
        };
        let (mut all, top_k) = moe.read(&config)?;
        let delta = self.delta(&config)?;
        for (layer, attends) in all.iter_mut().zip(Self::attends(&config, layers)?) {
            layer.rotary = self.bailing;
            if !attends {
                layer.mixer = Mixer::ChannelDelta(delta.clone());
            }
        }
        let rope = match self.bailing {
            true => {
                let max_position = read::max_position(&config)?;
                let theta = 6_000_000.0;
                let dialect = rope::Dialect { theta, interleaved: true, ..rope::Dialect::new(max_position) };
                rope::read(&config, &dialect)?
            }
            // Attention of Kimi-Linear knows no positions.
            false => RopeConfig { theta: 10_000.0, interleaved: false, scaling: RopeScaling::Default },
        };
        let gate = if self.bailing { OutputGate::Head } else { OutputGate::None };
        let renormalize = config.bool(named(&["moe_renormalize", "norm_topk_prob"]))?.unwrap_or(true);
        let experts = read::experts_of(&all);
        let groups = read::groups_of(&config, named(self.group_count_keys()), experts, top_k, GroupScore::TopTwoSum)?;
        let scale = if self.bailing { 2.5 } else { 1.0 };
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { gate, ..latent::read(&config, &rope)? },
            rope,
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", scale))?,
                ..Routing::new(top_k, RoutingKind::Sigmoid { renormalize, correction_bias: true, groups })
            },
            layers: all,
        };
        Ok(ModelConfig { mtp_layers: read::mtp_layers(&config)?, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        if self.bailing {
            return match role {
                Role::Embedding => "model.word_embeddings.weight".to_string(),
                Role::Layer(layer, LayerRole::CorrectionBias) => format!("model.layers.{layer}.mlp.gate.expert_bias"),
                Role::Layer(_, LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown) => {
                    names::shared_experts(role)
                }
                role => names::channel_delta(role)
                    .replace(".self_attn.o_proj.", ".self_attn.dense.")
                    .replace(".self_attn.", ".attention."),
            };
        }
        match role {
            Role::Layer(layer, LayerRole::CorrectionBias) => {
                format!("model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias")
            }
            Role::Layer(_, LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown) => {
                names::shared_experts(role).replace(".mlp.", ".block_sparse_moe.")
            }
            Role::Layer(_, LayerRole::Router) => names::block_sparse(role),
            role => names::channel_delta(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        match self.bailing {
            true => names::expert_tensor_name(layer, tensor),
            false => names::block_sparse_expert(layer, tensor),
        }
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "n_routed_experts"]
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["num_experts_per_token", "num_experts_per_tok"]
    }

    fn group_count_keys(&self) -> &'static [&'static str] {
        &["num_expert_group", "n_group"]
    }
}
