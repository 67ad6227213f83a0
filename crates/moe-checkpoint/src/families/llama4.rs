//! Llama 4: chunks that attention does not look beyond, layers without positions whose queries grow, weights that
//! multiply what an expert reads, a shared expert; experts stored transposed.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, QueryGrowth, Routing, RoutingKind, SharedExpert};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read, rope};

/// The family `llama4_text`.
pub(crate) struct Llama4;

impl Llama4 {
    /// Whether each layer rotates: `no_rope_layers`, which has a 1 for those that do, by default all but the last of
    /// every `no_rope_layer_interval` layers.
    fn rotates(config: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
        let interval = config.integer("no_rope_layer_interval", 1, MAX_SIZE)?.unwrap_or(4);
        let stated = config.integers("no_rope_layers", 0, 1)?.filter(|stated| !stated.is_empty());
        match stated {
            Some(stated) if stated.len() != layers => {
                let expected = format!("`num_hidden_layers` = {layers} entries, not {}", stated.len());
                Err(config.invalid("no_rope_layers", expected))
            }
            Some(stated) => Ok(stated.into_iter().map(|rotates| rotates == 1).collect()),
            None => Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect()),
        }
    }
}

impl Family for Llama4 {
    fn model_type(&self) -> &'static str {
        "llama4_text"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let layers = read::num_layers(&config)?;
        let step = config.integer("interleave_moe_layer_step", 1, MAX_SIZE)?.unwrap_or(1);
        let listed = config.integers("moe_layers", 0, MAX_SIZE)?;
        let is_moe = (0..layers).map(|layer| match &listed {
            Some(listed) => listed.contains(&layer),
            None => (layer + 1).is_multiple_of(step),
        });
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared: Some(SharedExpert::new(read::size(&config, "intermediate_size")?)),
            is_moe: is_moe.collect(),
            why: format!("`moe_layers`, or every {step} layers"),
            windows: &vec![None; layers],
        };
        let (mut all, top_k) = moe.read(&config)?;
        let rotates = Self::rotates(&config, layers)?;
        let words = read::layer_words(&config, "layer_types", layers, &["full_attention", "chunked_attention"])?;
        let chunk = config.integer("attention_chunk_size", 1, MAX_SIZE)?;
        // Dense layers have a width of their own.
        let dense = config.integer("intermediate_size_mlp", 1, MAX_SIZE)?.unwrap_or(16_384);
        for (index, (layer, rotates)) in all.iter_mut().zip(rotates).enumerate() {
            layer.rotary = rotates;
            layer.chunk = chunk.filter(|_| words.as_ref().map_or(rotates, |words| words[index] == 1));
            if let crate::Ffn::Dense { intermediate_size, .. } = &mut layer.ffn {
                *intermediate_size = dense;
            }
        }
        if let (Some(words), None) = (&words, chunk)
            && words.contains(&1)
        {
            let expected = "a number of tokens, since `layer_types` has chunked layers";
            return Err(config.missing("attention_chunk_size", expected));
        }
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let growth = QueryGrowth {
            rate: config.float("attn_scale")?.unwrap_or(0.1),
            length: config.integer("floor_scale", 1, MAX_SIZE)?.unwrap_or(8192),
            offset: 1,
        };
        let attention = AttentionConfig {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: if config.bool("use_qk_norm")?.unwrap_or(true) { QkNorm::Unit } else { QkNorm::None },
            growth: config.bool("attn_temperature_tuning")?.unwrap_or(true).then_some(growth),
            ..read::attention(&config)?
        };
        let kind = RoutingKind::Sigmoid { renormalize: false, correction_bias: false, groups: None };
        let dialect =
            rope::Dialect { theta: 500_000.0, interleaved: true, llama3: true, ..rope::Dialect::new(max_position) };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &dialect)?,
            routing: Routing { on_inputs: true, ..Routing::new(top_k, kind) },
            layers: all,
        };
        let norm_eps = config.positive_float("rms_norm_eps")?.unwrap_or(1e-5);
        Ok(ModelConfig { norm_eps, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        let name = match role {
            Role::Layer(layer, LayerRole::Router) => format!("model.layers.{layer}.mlp.router.weight"),
            role => names::tensor_name(role),
        };
        name.replace(".mlp.", ".feed_forward.")
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor).replace(".mlp.", ".feed_forward.")
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Transposed, ExpertLayout::PerExpert, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Transposed
    }

    fn shared_follows_width(&self) -> bool {
        true
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
