//! MiniMax-Text-01 and MiniMax-M1: lightning attention in most layers, softmax attention in the others, halves that are
//! added to their normed input, softmax routing.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, HalfFactors, LightningAttention, Mixer, ModelConfig, NormedResidual, Routing, RoutingKind,
};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The family `minimax`.
pub(crate) struct MiniMax;

impl MiniMax {
    /// Factors of one sort of half.
    fn factors(config: &Fields<'_>, [carry, half]: [&str; 2]) -> Result<HalfFactors> {
        let number = |key: &str| Ok::<_, crate::Error>(config.float(key)?.unwrap_or(1.0));
        Ok(HalfFactors { carry: number(carry)?, half: number(half)? })
    }
}

impl Family for MiniMax {
    fn model_type(&self) -> &'static str {
        "minimax"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let count = read::num_layers(&config)?;
        let words = read::layer_words(&config, "layer_types", count, &["full_attention", "linear_attention"])?;
        // transformers takes every second layer, the first one full, where a config does not list them.
        let linear: Vec<bool> = match words {
            Some(words) => words.into_iter().map(|word| word == 1).collect(),
            None => (0..count).map(|layer| layer % 2 == 1).collect(),
        };
        if config.string("hidden_act")?.is_some_and(|found| found != "silu" && found != "swish") {
            return Err(config.invalid("hidden_act", "\"silu\", which queries, keys and values go through, too"));
        }
        let window = read::plain_window(&config)?;
        let windows: Vec<Option<usize>> = linear.iter().map(|linear| window.filter(|_| !linear)).collect();
        let (mut layers, top_k) = read::all_moe(&config, self.expert_count_keys(), false, &windows)?;
        for (index, (layer, _)) in layers.iter_mut().zip(&linear).enumerate().filter(|(_, (_, linear))| **linear) {
            layer.mixer = Mixer::Lightning(LightningAttention {
                heads: plain.num_heads,
                head_dim: plain.head_dim,
                factor: 1.0 - index as f64 / (count as f64 - 1.0 + 1e-5) + 1e-5,
            });
        }
        let attention = AttentionConfig { rotary_dim: rope::rotary_dim(&config, plain.head_dim, 1.0)?, ..plain };
        let dialect = rope::Dialect { theta: 1_000_000.0, partial: true, ..rope::Dialect::new(max_position) };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &dialect)?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize: true }),
            layers,
        };
        Ok(ModelConfig {
            normed_residual: Some(NormedResidual {
                full: Self::factors(&config, ["full_attn_alpha_factor", "full_attn_beta_factor"])?,
                linear: Self::factors(&config, ["linear_attn_alpha_factor", "linear_attn_beta_factor"])?,
                ffn: Self::factors(&config, ["mlp_alpha_factor", "mlp_beta_factor"])?,
            }),
            norm_eps: config.positive_float("rms_norm_eps")?.unwrap_or(1e-5),
            ..model.read(&config, generation)?
        })
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
