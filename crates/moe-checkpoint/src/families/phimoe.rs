//! Phi-3.5-MoE: LayerNorm with biases, biases in attention and head, sparsemixer routing.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, NormKind, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `phimoe`.
pub(crate) struct Phimoe;

impl Family for Phimoe {
    fn model_type(&self) -> &'static str {
        "phimoe"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![read::plain_window(&config)?; read::num_layers(&config)?];
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        if top_k != 2 {
            return Err(config.invalid("num_experts_per_tok", "2, the number of experts that sparsemixer selects"));
        }
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let jitter_eps = config.float("router_jitter_noise")?.unwrap_or(0.01);
        let attention = AttentionConfig { qkv_bias: attention_bias, output_bias: attention_bias, ..plain };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(
                &config,
                &rope::Dialect { theta: 1_000_000.0, longrope: true, ..rope::Dialect::new(max_position) },
            )?,
            routing: Routing::new(top_k, RoutingKind::Sparsemixer { jitter_eps }),
            layers,
        };
        let head_bias = config.bool("lm_head_bias")?.unwrap_or(false);
        Ok(ModelConfig { norm: NormKind::Layer, head_bias, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        names::block_sparse(role)
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::block_sparse_expert(layer, tensor)
    }

    fn other_words(&self) -> &'static [&'static [(&'static str, &'static str)]] {
        // As transformers 5 calls them in memory, and saves them without `save_original_format`.
        &[
            &[(".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp.")],
            &[(".block_sparse_moe.", ".mlp.")],
        ]
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
