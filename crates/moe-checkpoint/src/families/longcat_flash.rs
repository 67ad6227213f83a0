//! LongCat-Flash (arXiv 2509.01322): layers of two latent attentions and two dense blocks, with routed experts beside
//! them on a shortcut, and identity experts that cost nothing.
//!
//! One layer of the config is two decoder layers here. The first has the routed experts, and its dense block is their
//! shared expert, since both read the same; what the routed experts give joins the residual stream at the end of the
//! second, which has the other attention and the other dense block.

use serde_json::Value;

use crate::config::{AttentionConfig, AttentionKind, Ffn, ModelConfig, MoeConfig, Routing, RoutingKind, SharedExpert};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;
use crate::{Error, Result};

use super::read::MAX_SIZE;
use super::{latent, names, read, rope};

/// The family `longcat_flash`.
pub(crate) struct LongcatFlash;

/// Most layers of a config, half as many as there may be decoder layers.
const MAX_PAIRS: usize = 1 << 11;

impl LongcatFlash {
    /// Layers of the config, each a pair of decoder layers.
    fn pairs(config: &Fields<'_>) -> Result<usize> {
        let halves = config.integer("num_hidden_layers", 2, 2 * MAX_PAIRS)?;
        match (config.integer("num_layers", 1, MAX_PAIRS)?, halves) {
            (Some(pairs), Some(halves)) if halves != 2 * pairs && halves != pairs => {
                Err(config.conflict("num_layers", "num_hidden_layers"))
            }
            (Some(pairs), _) => Ok(pairs),
            (None, Some(halves)) if halves % 2 == 0 => Ok(halves / 2),
            (None, Some(_)) => Err(config.invalid("num_hidden_layers", "an even number, two for each of `num_layers`")),
            (None, None) => Err(config.missing("num_layers", format!("an integer from 1 to {MAX_PAIRS}"))),
        }
    }

    /// Latent attention whose queries and latents of keys and values are scaled up to the width of the residual stream.
    fn attention(config: &Fields<'_>, rope: &crate::config::RopeConfig, hidden: usize) -> Result<AttentionConfig> {
        let attention = latent::read(config, rope)?;
        let AttentionKind::Latent(latent) = &attention.kind else { return Ok(attention) };
        let mut latent = latent.clone();
        let up = |rank: usize| (hidden as f64 / rank as f64).sqrt();
        let scales = |key| Ok::<_, Error>(config.bool(key)?.unwrap_or(true));
        let query = match latent.q_lora_rank {
            None => return Err(config.missing("q_lora_rank", "the width of the latent of queries")),
            Some(rank) => {
                if scales("mla_scale_q_lora")? {
                    up(rank)
                } else {
                    1.0
                }
            }
        };
        if scales("mla_scale_kv_lora")? {
            latent.kv_scale = up(latent.kv_lora_rank);
        }
        // The factor on whole queries is one on their dot products.
        let scale = Some(query * attention.softmax_scale());
        Ok(AttentionConfig { kind: AttentionKind::Latent(latent), scale, ..attention })
    }
}

impl Family for LongcatFlash {
    fn model_type(&self) -> &'static str {
        "longcat_flash"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let layers = 2 * Self::pairs(&config)?;
        let hidden = read::size(&config, "hidden_size")?;
        let dense = read::size(&config, "ffn_hidden_size")?;
        if config.string("zero_expert_type")?.is_some_and(|found| found != "identity") {
            return Err(config.invalid("zero_expert_type", "\"identity\""));
        }
        if config.string("attention_method")?.is_some_and(|found| found != "MLA") {
            return Err(config.invalid("attention_method", "\"MLA\""));
        }
        let identities = config.integer("zero_expert_num", 0, MAX_SIZE)?.unwrap_or(0);
        if identities > 1 << 16 {
            return Err(config.invalid("zero_expert_num", "at most 65536"));
        }
        let experts = read::num_experts(&config, self.expert_count_keys())?;
        if experts == 0 {
            let reason = "`n_routed_experts` is 0".to_string();
            return Err(Error::NotMoe { file: CONFIG.to_string(), reason });
        }
        let top_k = config.required_integer("moe_topk", 1, experts)?;
        let width = read::size(&config, "expert_ffn_hidden_size")?;
        let rope_config = {
            let max_position = read::size(&config, "max_position_embeddings")?;
            let theta = 10_000_000.0;
            rope::read(&config, &rope::Dialect { theta, interleaved: true, ..rope::Dialect::new(max_position) })?
        };
        let moe =
            MoeConfig { identities, shortcut: true, ..read::moe(vec![width; experts], Some(SharedExpert::new(dense))) };
        let layer = |layer: usize| match layer.is_multiple_of(2) {
            true => read::plain_layer(Ffn::Moe(moe.clone())),
            false => read::plain_layer(Ffn::Dense { intermediate_size: dense, gateless: false }),
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention: Self::attention(&config, &rope_config, hidden)?,
            rope: rope_config,
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 6.0))?,
                bias: config.bool("router_bias")?.unwrap_or(false),
                ..Routing::new(top_k, RoutingKind::SoftmaxCorrected { norm_min: None })
            },
            layers: (0..layers).map(layer).collect(),
        };
        model.read(&config, generation)
    }

    fn tensor_name(&self, role: Role) -> String {
        let Role::Layer(layer, role) = role else { return names::tensor_name(role) };
        let (pair, half) = (layer / 2, layer % 2);
        let name = match role {
            LayerRole::Router => return format!("model.layers.{pair}.mlp.router.classifier.weight"),
            LayerRole::RouterBias => return format!("model.layers.{pair}.mlp.router.classifier.bias"),
            LayerRole::CorrectionBias => return format!("model.layers.{pair}.mlp.router.e_score_correction_bias"),
            LayerRole::SharedGate => names::tensor_name(Role::Layer(pair, LayerRole::DenseGate)),
            LayerRole::SharedUp => names::tensor_name(Role::Layer(pair, LayerRole::DenseUp)),
            LayerRole::SharedDown => names::tensor_name(Role::Layer(pair, LayerRole::DenseDown)),
            role => names::tensor_name(Role::Layer(pair, role)),
        };
        let numbered = |part: &str| format!(".{part}.{half}.");
        name.replace(".mlp.", &numbered("mlps"))
            .replace(".self_attn.", &numbered("self_attn"))
            .replace(".input_layernorm.", &numbered("input_layernorm"))
            .replace(".post_attention_layernorm.", &numbered("post_attention_layernorm"))
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer / 2, tensor)
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        let pair = names::layer_of(name)?;
        let second = [".mlps.1.", ".self_attn.1.", ".input_layernorm.1.", ".post_attention_layernorm.1."];
        Some(2 * pair + usize::from(second.iter().any(|part| name.contains(part))))
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::PerExpert, ExpertLayout::Ragged]
    }

    fn identity_expert_tensors(&self) -> bool {
        true
    }

    fn width_key(&self) -> &'static str {
        "expert_ffn_hidden_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["moe_topk", "num_experts_per_tok"]
    }

    fn size_keys(&self, role: Role) -> &'static str {
        match role {
            Role::Layer(_, LayerRole::Router) => "`n_routed_experts` plus `zero_expert_num`, and `hidden_size`",
            Role::Layer(_, LayerRole::RouterBias | LayerRole::CorrectionBias) => {
                "`n_routed_experts` plus `zero_expert_num`"
            }
            Role::Layer(
                _,
                LayerRole::SharedGate
                | LayerRole::SharedUp
                | LayerRole::SharedDown
                | LayerRole::DenseGate
                | LayerRole::DenseUp
                | LayerRole::DenseDown,
            ) => "`ffn_hidden_size` and `hidden_size`",
            role => names::size_keys(role),
        }
    }
}
