//! Nemotron-H: layers that are one half each (Mamba2, attention without positions, a dense block, experts), ReLU²
//! blocks without a gate, sigmoid routing with correction bias; experts may read a latent of the residual stream.

use serde_json::Value;

use crate::Result;
use crate::config::{
    Activation, AttentionConfig, Ffn, GroupScore, LayerConfig, Mamba, Mixer, ModelConfig, RopeConfig, RopeScaling,
    Routing, RoutingKind, SharedExpert,
};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read};

/// The family `nemotron_h`.
pub(crate) struct NemotronH;

/// What a layer is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Mamba,
    Attention,
    Dense,
    Experts,
}

impl NemotronH {
    /// `layers_block_type`, or the letters of `hybrid_override_pattern`.
    fn kinds(config: &Fields<'_>) -> Result<Vec<Kind>> {
        const WORDS: [(&str, char, Kind); 6] = [
            ("linear_attention", 'M', Kind::Mamba),
            ("mamba", 'M', Kind::Mamba),
            ("full_attention", '*', Kind::Attention),
            ("attention", '*', Kind::Attention),
            ("mlp", '-', Kind::Dense),
            ("moe", 'E', Kind::Experts),
        ];
        if let Some(listed) = config.list("layers_block_type")? {
            let kind = |value: &Value| WORDS.iter().find(|word| value.as_str() == Some(word.0)).map(|word| word.2);
            let kinds: Option<Vec<Kind>> = listed.iter().map(kind).collect();
            let expected = "a list of \"linear_attention\", \"full_attention\", \"mlp\" and \"moe\"";
            return kinds
                .filter(|kinds| !kinds.is_empty())
                .ok_or_else(|| config.invalid("layers_block_type", expected));
        }
        let key = "hybrid_override_pattern";
        let expected = "a text of `M` (Mamba2), `*` (attention), `-` (dense) and `E` (experts), one per layer";
        let pattern = config.string(key)?.ok_or_else(|| config.missing(key, expected))?;
        let kind = |letter: char| WORDS.iter().find(|word| word.1 == letter).map(|word| word.2);
        let kinds: Option<Vec<Kind>> = pattern.chars().map(kind).collect();
        let kinds = kinds.filter(|kinds| !kinds.is_empty()).ok_or_else(|| config.invalid(key, expected))?;
        match config.integer("num_hidden_layers", 1, MAX_SIZE)? {
            Some(layers) if layers != kinds.len() => {
                Err(config.invalid(key, format!("`num_hidden_layers` = {layers} letters, not {}", kinds.len())))
            }
            _ => Ok(kinds),
        }
    }

    fn mamba(config: &Fields<'_>) -> Result<Mamba> {
        let size = |key: &str, default: usize| {
            Ok::<_, crate::Error>(config.integer(key, 1, read::MAX_HEADS)?.unwrap_or(default))
        };
        let mamba = Mamba {
            heads: size("mamba_num_heads", 128)?,
            head_dim: size("mamba_head_dim", 64)?,
            groups: size("n_groups", 8)?,
            state: size("ssm_state_size", 128)?,
            kernel: size("conv_kernel", 4)?,
            convolution_bias: config.bool("use_conv_bias")?.unwrap_or(true),
            least_step: config.float("time_step_min")?.unwrap_or(0.001),
        };
        read::check_mamba(config, mamba, "n_groups", "mamba_num_heads")
    }
}

impl Family for NemotronH {
    fn model_type(&self) -> &'static str {
        "nemotron_h"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        for key in ["use_bias", "mlp_bias", "mamba_proj_bias"] {
            if config.bool(key)?.unwrap_or(false) {
                return Err(config.invalid(key, "false, as in all released models"));
            }
        }
        for (key, only) in [("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")] {
            if config.string(key)?.is_some_and(|found| found != only) {
                return Err(config.invalid(key, format!("\"{only}\"")));
            }
        }
        let kinds = Self::kinds(&config)?;
        let width = config.integer("moe_shared_expert_intermediate_size", 0, MAX_SIZE)?;
        let shared = width.filter(|_| config.value("n_shared_experts").and_then(Value::as_u64) != Some(0));
        let shared =
            shared.filter(|width| *width > 0).map(|width| SharedExpert { gateless: true, ..SharedExpert::new(width) });
        let windows = vec![None; kinds.len()];
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared,
            is_moe: kinds.iter().map(|kind| *kind == Kind::Experts).collect(),
            why: "no layer of the pattern has experts".to_string(),
            windows: &windows,
        };
        let (mut layers, top_k) = moe.read(&config)?;
        let mamba = Self::mamba(&config)?;
        for (layer, kind) in layers.iter_mut().zip(&kinds) {
            let mixer = match kind {
                Kind::Mamba => Mixer::Mamba(mamba.clone()),
                Kind::Attention => Mixer::Attention,
                Kind::Dense | Kind::Experts => Mixer::None,
            };
            *layer = LayerConfig { rotary: false, mixer, ..layer.clone() };
            match (&mut layer.ffn, kind) {
                (Ffn::Moe(moe), _) => moe.gateless = true,
                (Ffn::Dense { gateless, .. }, Kind::Dense) => *gateless = true,
                (ffn, _) => *ffn = Ffn::None,
            }
        }
        let groups = read::groups(&config, read::experts_of(&layers), top_k, GroupScore::TopTwoSum)?;
        let renormalize = config.bool("norm_topk_prob")?.unwrap_or(true);
        let kind = RoutingKind::Sigmoid { renormalize, correction_bias: true, groups };
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { qkv_bias: bias, output_bias: bias, ..read::attention(&config)? },
            // Its attention knows no positions.
            rope: RopeConfig { theta: 10_000.0, interleaved: false, scaling: RopeScaling::Default },
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 1.0))?,
                ..Routing::new(top_k, kind)
            },
            layers,
        };
        let norm_eps = match config.positive_float("layer_norm_epsilon")? {
            Some(eps) => eps,
            None => config.positive_float("norm_eps")?.unwrap_or(1e-5),
        };
        // Without a gate the up projection is the gate, too: relu(u) u.
        Ok(ModelConfig {
            hidden_act: Activation::Relu,
            norm_eps,
            expert_latent: config.integer("moe_latent_size", 1, MAX_SIZE)?,
            mtp_layers: read::mtp_layers(&config)?,
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        let (layer, of) = match role {
            Role::Embedding => return "backbone.embeddings.weight".to_string(),
            Role::FinalNorm => return "backbone.norm_f.weight".to_string(),
            Role::Layer(layer, of) => (layer, of),
            role => return names::tensor_name(role),
        };
        let name = match of {
            LayerRole::AttentionNorm | LayerRole::FfnNorm => "norm.weight",
            LayerRole::DenseUp => "mixer.up_proj.weight",
            LayerRole::DenseDown => "mixer.down_proj.weight",
            of => {
                let name = names::shared_experts(Role::Layer(layer, of));
                let own = name.split_once(&format!("layers.{layer}.")).map_or(name.as_str(), |(_, own)| own);
                let own =
                    ["mlp.", "self_attn.", "mamba."].iter().find_map(|block| own.strip_prefix(block)).unwrap_or(own);
                return format!("backbone.layers.{layer}.mixer.{own}");
            }
        };
        format!("backbone.layers.{layer}.{name}")
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor)
            .replace("model.layers.", "backbone.layers.")
            .replace(".mlp.", ".mixer.")
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        names::layer_of(&name.replacen("backbone.", "model.", 1))
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Gateless, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Gateless
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }
}
