//! Mixtral: experts `w1` (gate), `w3` (up), `w2` (down) under `block_sparse_moe`, weights renormalized.

use serde_json::Value;

use crate::Result;
use crate::config::{ModelConfig, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `mixtral`.
pub(crate) struct Mixtral;

impl Family for Mixtral {
    fn model_type(&self) -> &'static str {
        "mixtral"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![read::plain_window(&config)?; read::num_layers(&config)?];
        let (layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        let model = read::Model {
            model_type: self.model_type(),
            attention: plain,
            rope: rope::read(
                &config,
                &rope::Dialect { theta: 1_000_000.0, llama3: true, ..rope::Dialect::new(max_position) },
            )?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize: true }),
            layers,
        };
        model.read(&config, generation)
    }

    fn tensor_name(&self, role: Role) -> String {
        names::block_sparse(role)
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::block_sparse_expert(layer, tensor)
    }

    fn other_words(&self) -> &'static [&'static [(&'static str, &'static str)]] {
        // As transformers 5 calls them in memory, and saves them without `save_original_format`.
        &[&[(".block_sparse_moe.", ".mlp.")]]
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
