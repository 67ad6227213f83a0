//! LFM2-MoE: gated short convolutions in most layers, softmax attention with norms per head in the others, sigmoid
//! routing with a bias for the selection.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, Mixer, ModelConfig, QkNorm, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read, rope};

/// The family `lfm2_moe`.
pub(crate) struct Lfm2Moe;

/// Longest convolution.
const MAX_KERNEL: usize = 1 << 10;

impl Family for Lfm2Moe {
    fn model_type(&self) -> &'static str {
        "lfm2_moe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let layers = read::num_layers(&config)?;
        let dense = config.integer("num_dense_layers", 0, MAX_SIZE)?.unwrap_or(2);
        if config.bool("conv_bias")?.unwrap_or(false) {
            return Err(config.invalid("conv_bias", "false, as in all released models"));
        }
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: "moe_intermediate_size",
            bias: false,
            shared: None,
            is_moe: (0..layers).map(|layer| layer >= dense).collect(),
            why: format!("`num_dense_layers` {dense}"),
            windows: &vec![None; layers],
        };
        let (mut all, top_k) = moe.read(&config)?;
        let kernel = config.integer("conv_L_cache", 1, MAX_KERNEL)?.unwrap_or(3);
        let words = read::layer_words(&config, "layer_types", layers, &["full_attention", "conv"])?;
        let Some(words) = words else {
            return Err(config.missing("layer_types", "a list of \"full_attention\" and \"conv\""));
        };
        for (layer, word) in all.iter_mut().zip(words) {
            if word == 1 {
                layer.mixer = Mixer::ShortConvolution { kernel };
            }
        }
        let attention = AttentionConfig { qk_norm: QkNorm::Head, ..plain };
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(true);
        let correction_bias = config.bool("use_expert_bias")?.unwrap_or(true);
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { theta: 1_000_000.0, ..rope::Dialect::new(max_position) })?,
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 1.0))?,
                norm_eps: 1e-6,
                ..Routing::new(top_k, RoutingKind::Sigmoid { renormalize, correction_bias, groups: None })
            },
            layers: all,
        };
        let norm_eps = config.positive_float("norm_eps")?.unwrap_or(1e-5);
        let tie_word_embeddings = match config.bool("tie_word_embeddings")? {
            Some(tied) => tied,
            None => config.bool("tie_embedding")?.unwrap_or(true),
        };
        Ok(ModelConfig { norm_eps, tie_word_embeddings, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        let (layer, role) = match role {
            Role::FinalNorm => return "model.embedding_norm.weight".to_string(),
            Role::Layer(layer, role) => (layer, role),
            role => return names::tensor_name(role),
        };
        let name = match role {
            LayerRole::AttentionNorm => "operator_norm.weight",
            LayerRole::FfnNorm => "ffn_norm.weight",
            LayerRole::Output => "self_attn.out_proj.weight",
            LayerRole::QueryNorm => "self_attn.q_layernorm.weight",
            LayerRole::KeyNorm => "self_attn.k_layernorm.weight",
            LayerRole::Router => "feed_forward.gate.weight",
            LayerRole::CorrectionBias => "feed_forward.expert_bias",
            LayerRole::DenseGate => "feed_forward.w1.weight",
            LayerRole::DenseUp => "feed_forward.w3.weight",
            LayerRole::DenseDown => "feed_forward.w2.weight",
            role => return names::tensor_name(Role::Layer(layer, role)),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::block_sparse_expert(layer, tensor).replace(".block_sparse_moe.", ".feed_forward.")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
