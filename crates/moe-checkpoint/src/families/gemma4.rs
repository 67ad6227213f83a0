//! Gemma 4 with experts: a dense block beside the routed experts, norms before and after everything, layers with a
//! window that have heads of their own, a router that reads the residual stream through its own norm; inputs of every
//! layer's own, and last layers that read the keys and values of layers before them.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, Ffn, LayerConfig, LayerInputs, LocalAttention, ModelConfig, Multipliers, NormPlacement, QkNorm,
    RopeConfig, RopeScaling, Routing, RoutingKind, SharedExpert,
};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read};

/// The family `gemma4_text`.
pub(crate) struct Gemma4;

/// Every so many layers, the last one has no window, where a config does not list them.
const PATTERN: usize = 6;

impl Gemma4 {
    /// Attention of the layers without a window: `global_head_dim` and `num_global_key_value_heads`, or what
    /// `per_layer_config` says of them all.
    fn global(config: &Fields<'_>, plain: &AttentionConfig, full: &[usize]) -> Result<AttentionConfig> {
        let tied_values = config.bool("attention_k_eq_v")?.unwrap_or(false);
        let mut head_dim = config.integer("global_head_dim", 1, MAX_SIZE)?.unwrap_or(512);
        let mut num_kv_heads = plain.num_kv_heads;
        if let Some(heads) = config.integer("num_global_key_value_heads", 1, MAX_SIZE)?.filter(|_| tied_values) {
            num_kv_heads = heads;
        }
        if let Some(per_layer) = config.object("per_layer_config")? {
            (head_dim, num_kv_heads) = (plain.head_dim, plain.num_kv_heads);
            let mut seen = None;
            for layer in full {
                let own = per_layer.object(&layer.to_string())?;
                let of = |key: &str, default: usize| match &own {
                    Some(own) => Ok(own.integer(key, 1, MAX_SIZE)?.unwrap_or(default)),
                    None => Ok::<_, crate::Error>(default),
                };
                let found = (of("head_dim", head_dim)?, of("num_key_value_heads", num_kv_heads)?);
                if *seen.get_or_insert(found) != found {
                    let expected = "the same heads for all layers without a window";
                    return Err(config.invalid("per_layer_config", expected));
                }
            }
            (head_dim, num_kv_heads) = seen.unwrap_or((head_dim, num_kv_heads));
        }
        if head_dim % 2 != 0 {
            return Err(config.invalid("global_head_dim", "an even number, which the rotary embedding needs"));
        }
        if !plain.num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of `num_attention_heads` = {}", plain.num_heads);
            return Err(config.invalid("num_global_key_value_heads", expected));
        }
        Ok(AttentionConfig { head_dim, rotary_dim: head_dim, num_kv_heads, tied_values, ..plain.clone() })
    }

    /// The last `num_kv_shared_layers` layers read the keys and values of the last layer of their kind before them, and
    /// may have dense blocks of twice the width.
    fn share_keys(config: &Fields<'_>, layers: &mut [LayerConfig]) -> Result<()> {
        let count = layers.len();
        let shared = config.integer("num_kv_shared_layers", 0, MAX_SIZE)?.unwrap_or(0);
        let wide = config.bool("use_double_wide_mlp")?.unwrap_or(false);
        if shared >= count {
            return Err(config.invalid("num_kv_shared_layers", format!("below `num_hidden_layers` = {count}")));
        }
        let (own, readers) = layers.split_at_mut(count - shared);
        for reader in readers {
            let alike = |layer: &LayerConfig| layer.sliding_window.is_some() == reader.sliding_window.is_some();
            let Some(of) = own.iter().rposition(alike) else {
                let expected = format!("a layer of every kind in `layer_types` among the first {}", own.len());
                return Err(config.invalid("num_kv_shared_layers", expected));
            };
            reader.keys_of = Some(of);
            if let (true, Ffn::Moe(moe)) = (wide, &mut reader.ffn) {
                moe.shared.iter_mut().for_each(|dense| dense.intermediate_size *= 2);
            }
        }
        Ok(())
    }

    /// Inputs of the layers' own, which transformers takes a model to have whose config does not say.
    fn layer_inputs(config: &Fields<'_>) -> Result<Option<LayerInputs>> {
        let width = config.integer("hidden_size_per_layer_input", 0, MAX_SIZE)?.unwrap_or(256);
        let vocab_size = config.integer("vocab_size_per_layer_input", 1, MAX_SIZE)?.unwrap_or(262_144);
        Ok((width > 0).then_some(LayerInputs { width, vocab_size }))
    }

    /// The rotary embedding of the layers with a window, or of the others.
    fn rope(config: &Fields<'_>, local: bool, head_dim: usize) -> Result<RopeConfig> {
        let (key, kind, theta, share) = match local {
            true => ("sliding_attention", "default", 10_000.0, 1.0),
            false => ("full_attention", "proportional", 1_000_000.0, 0.25),
        };
        let Some(all) = config.object("rope_parameters")? else {
            let pairs = (share * head_dim as f64 / 2.0) as usize;
            let scaling = if local { RopeScaling::Default } else { RopeScaling::Proportional { pairs, factor: 1.0 } };
            return Ok(RopeConfig { theta, interleaved: false, scaling });
        };
        let expected = "the rotary embedding of these layers";
        let own = all.object(key)?.ok_or_else(|| all.missing(key, expected))?;
        let scaling = match own.string("rope_type")?.unwrap_or(kind) {
            "default" => RopeScaling::Default,
            "proportional" => {
                let share = own.positive_float("partial_rotary_factor")?.unwrap_or(1.0);
                if share > 1.0 {
                    return Err(own.invalid("partial_rotary_factor", "at most 1"));
                }
                let factor = own.positive_float("factor")?.unwrap_or(1.0);
                RopeScaling::Proportional { pairs: (share * head_dim as f64 / 2.0) as usize, factor }
            }
            _ => return Err(own.invalid("rope_type", "\"default\" or \"proportional\"")),
        };
        Ok(RopeConfig { theta: own.positive_float("rope_theta")?.unwrap_or(theta), interleaved: false, scaling })
    }
}

impl Family for Gemma4 {
    fn model_type(&self) -> &'static str {
        "gemma4_text"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        if !config.bool("enable_moe_block")?.unwrap_or(false) {
            let reason = "field `enable_moe_block` is missing or false: this is a dense Gemma 4".to_string();
            return Err(crate::Error::NotMoe { file: CONFIG.to_string(), reason });
        }
        if config.string("use_bidirectional_attention")? == Some("all") {
            return Err(config.invalid("use_bidirectional_attention", "null or \"vision\": texts are read forward"));
        }
        let layers = read::num_layers(&config)?;
        let hidden_size = read::size(&config, "hidden_size")?;
        let window = config.integer("sliding_window", 1, MAX_SIZE)?.unwrap_or(512);
        let words = read::layer_words(&config, "layer_types", layers, &["full_attention", "sliding_attention"])?;
        let mut slides: Vec<bool> = match words {
            Some(words) => words.into_iter().map(|word| word == 1).collect(),
            None => (1..=layers).map(|layer| !layer.is_multiple_of(PATTERN)).collect(),
        };
        // transformers gives the last layer no window, whatever a config says.
        slides[layers - 1] = false;
        let windows: Vec<Option<usize>> = slides.iter().map(|slides| slides.then_some(window)).collect();
        let full: Vec<usize> = (0..layers).filter(|layer| !slides[*layer]).collect();
        let shared = SharedExpert { apart: true, ..SharedExpert::new(read::size(&config, "intermediate_size")?) };
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "top_k_experts",
            width_key: self.width_key(),
            bias: false,
            shared: Some(shared),
            is_moe: vec![true; layers],
            why: "no expert".to_string(),
            windows: &windows,
        };
        let (mut layers, top_k) = moe.read(&config)?;
        Self::share_keys(&config, &mut layers)?;
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let plain = AttentionConfig {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: QkNorm::Head,
            value_norm: true,
            scale: Some(1.0),
            ..read::attention(&config)?
        };
        let attention = Self::global(&config, &plain, &full)?;
        let kind = RoutingKind::SoftmaxTopK { renormalize: true };
        let model = read::Model {
            model_type: self.model_type(),
            rope: Self::rope(&config, false, attention.head_dim)?,
            routing: Routing { own_norm: true, expert_scales: true, ..Routing::new(top_k, kind) },
            attention,
            layers,
        };
        Ok(ModelConfig {
            hidden_act: read::activation_of(&config, "hidden_activation", "gelu_pytorch_tanh")?,
            local: Some(Box::new(LocalAttention {
                rope: Self::rope(&config, true, plain.head_dim)?,
                attention: plain,
            })),
            placement: NormPlacement::Both,
            layer_scale: true,
            layer_inputs: Self::layer_inputs(&config)?,
            logit_cap: config.positive_float("final_logit_softcapping")?,
            multipliers: Multipliers { embedding: (hidden_size as f64).sqrt(), ..Multipliers::default() },
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(true),
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        let Role::Layer(layer, role) = role else { return names::tensor_name(role) };
        let name = match role {
            LayerRole::FfnNorm => "pre_feedforward_layernorm_2.weight",
            LayerRole::Router => "router.proj.weight",
            LayerRole::SharedGate => "mlp.gate_proj.weight",
            LayerRole::SharedUp => "mlp.up_proj.weight",
            LayerRole::SharedDown => "mlp.down_proj.weight",
            role => return names::tensor_name(Role::Layer(layer, role)),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor).replace(".mlp.experts", ".experts")
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Fused, ExpertLayout::PerExpert, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Fused
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "num_local_experts"]
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["top_k_experts", "num_experts_per_tok"]
    }
}
