//! Qwen3.5-MoE and Qwen3-Next: gated DeltaNet in most layers, gated softmax attention in the others, a gated shared
//! expert.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, DeltaNet, Mixer, ModelConfig, NormKind, OutputGate, QkNorm, Routing, RoutingKind, SharedExpert,
};
use crate::family::{CONFIG, Family};
use crate::json::Fields;

use super::read::{MAX_HEADS, MAX_SIZE};
use super::{read, rope};

/// The families `qwen3_5_moe_text` and `qwen3_next`.
pub(crate) struct Qwen35Moe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether it is Qwen3-Next: projections of gated DeltaNet ordered by key heads, weights divided by their sum if a
    /// config says so.
    pub next: bool,
}

impl Qwen35Moe {
    fn delta_net(&self, config: &Fields<'_>) -> Result<DeltaNet> {
        let size =
            |key: &str, default: usize| Ok::<_, crate::Error>(config.integer(key, 1, MAX_HEADS)?.unwrap_or(default));
        let delta = DeltaNet {
            key_heads: size("linear_num_key_heads", 16)?,
            value_heads: size("linear_num_value_heads", 32)?,
            key_head_dim: size("linear_key_head_dim", 128)?,
            value_head_dim: size("linear_value_head_dim", 128)?,
            kernel: size("linear_conv_kernel_dim", 4)?,
            grouped: self.next,
        };
        match delta.value_heads.is_multiple_of(delta.key_heads) {
            true => Ok(delta),
            false => {
                let expected = format!("a multiple of `linear_num_key_heads` = {}", delta.key_heads);
                Err(config.invalid("linear_num_value_heads", expected))
            }
        }
    }

    /// Whether each layer has softmax attention: `layer_types`, by default the last of every `full_attention_interval`
    /// layers.
    fn full_attention(config: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
        let interval = config.integer("full_attention_interval", 1, MAX_SIZE)?.unwrap_or(4);
        let words = read::layer_words(config, "layer_types", layers, &["linear_attention", "full_attention"])?;
        Ok(match words {
            Some(words) => words.into_iter().map(|word| word == 1).collect(),
            None => (1..=layers).map(|layer| layer.is_multiple_of(interval)).collect(),
        })
    }
}

impl Family for Qwen35Moe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let intermediate_size = read::size(&config, "shared_expert_intermediate_size")?;
        let shared = Some(SharedExpert { gated: true, ..SharedExpert::new(intermediate_size) });
        let layers = read::SparseLayers { expert_count_keys: self.expert_count_keys(), windows: &windows, shared };
        let (mut layers, top_k) = layers.read(&config)?;
        let delta = self.delta_net(&config)?;
        for (layer, full) in layers.iter_mut().zip(Self::full_attention(&config, windows.len())?) {
            if !full {
                layer.mixer = Mixer::DeltaNet(delta.clone());
            }
        }
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let attention = AttentionConfig {
            rotary_dim: rope::rotary_dim(&config, plain.head_dim, 0.25)?,
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            qk_norm: QkNorm::Head,
            gate: OutputGate::Query,
            ..plain
        };
        // Qwen3.5 divides whatever a config says.
        let renormalize = !self.next || config.bool("norm_topk_prob")?.unwrap_or(true);
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect { partial: true, ..rope::Dialect::new(max_position) })?,
            routing: Routing::new(top_k, RoutingKind::SoftmaxTopK { renormalize }),
            layers,
        };
        let mtp_layers = read::mtp_layers(&config)?;
        Ok(ModelConfig { norm: NormKind::RmsOnePlus, mtp_layers, ..model.read(&config, generation)? })
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }
}
