//! GraniteMoE, with and without a shared expert and state space layers: constant multipliers on embedding, residual
//! stream, attention and logits; fused experts.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, LayerConfig, Mamba, Mixer, ModelConfig, Multipliers, Routing, RoutingKind, SharedExpert,
};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::{names, read, rope};

/// The families `granitemoe`, `granitemoeshared` and `granitemoehybrid`.
pub(crate) struct GraniteMoe {
    /// `model_type` of its configs.
    pub model_type: &'static str,
    /// Whether there may be a shared expert.
    pub shared: bool,
    /// Whether layers may be state space ones, and whether they rotate is a field.
    pub hybrid: bool,
}

impl GraniteMoe {
    fn mamba(config: &Fields<'_>) -> Result<Mamba> {
        let size = |key: &str, default: usize| {
            Ok::<_, crate::Error>(config.integer(key, 1, read::MAX_HEADS)?.unwrap_or(default))
        };
        if config.bool("mamba_proj_bias")?.unwrap_or(false) {
            return Err(config.invalid("mamba_proj_bias", "false, as in all released models"));
        }
        let heads = size("mamba_n_heads", 128)?;
        let head_dim = match config.value("mamba_d_head").and_then(Value::as_str) {
            Some("auto") => size("mamba_expand", 2)? * read::size(config, "hidden_size")? / heads,
            _ => size("mamba_d_head", size("mamba_expand", 2)? * read::size(config, "hidden_size")? / heads)?,
        };
        let mamba = Mamba {
            heads,
            head_dim,
            groups: size("mamba_n_groups", 1)?,
            state: size("mamba_d_state", 256)?,
            kernel: size("mamba_d_conv", 4)?,
            convolution_bias: config.bool("mamba_conv_bias")?.unwrap_or(true),
            least_step: 0.0,
        };
        read::check_mamba(config, mamba, "mamba_n_groups", "mamba_n_heads")
    }

    /// Makes layers state space ones, and those that attend rotate or not.
    fn hybrid(config: &Fields<'_>, layers: &mut [LayerConfig]) -> Result<()> {
        let words = ["full_attention", "attention", "linear_attention", "mamba"];
        let Some(words) = read::layer_words(config, "layer_types", layers.len(), &words)? else {
            return Err(config.missing("layer_types", "a list of \"mamba\" and \"attention\""));
        };
        let mamba = Self::mamba(config)?;
        let rotary = config.string("position_embedding_type")? == Some("rope");
        for (layer, word) in layers.iter_mut().zip(words) {
            layer.rotary = rotary;
            if word >= 2 {
                layer.mixer = Mixer::Mamba(mamba.clone());
            }
        }
        Ok(())
    }
}

impl Family for GraniteMoe {
    fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let plain = read::attention(&config)?;
        let max_position = read::size(&config, "max_position_embeddings")?;
        let windows = vec![None; read::num_layers(&config)?];
        let width = match self.shared {
            true => config.integer("shared_intermediate_size", 0, read::MAX_SIZE)?.unwrap_or(1024),
            false => 0,
        };
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared: (width > 0).then(|| SharedExpert { packed: true, ..SharedExpert::new(width) }),
            is_moe: vec![true; windows.len()],
            why: "no expert".to_string(),
            windows: &windows,
        };
        let (mut layers, top_k) = moe.read(&config)?;
        if self.hybrid {
            Self::hybrid(&config, &mut layers)?;
        }
        let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
        let factor = |key: &str| Ok::<_, crate::Error>(config.positive_float(key)?.unwrap_or(1.0));
        let attention = AttentionConfig {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            scale: Some(factor("attention_multiplier")?),
            ..plain
        };
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            rope: rope::read(&config, &rope::Dialect::new(max_position))?,
            routing: Routing::new(top_k, RoutingKind::TopKSoftmax),
            layers,
        };
        let multipliers = Multipliers {
            embedding: factor("embedding_multiplier")?,
            residual: factor("residual_multiplier")?,
            logits_divisor: factor("logits_scaling")?,
        };
        Ok(ModelConfig { multipliers, ..model.read(&config, generation)? })
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::Router) => {
                format!("model.layers.{layer}.block_sparse_moe.router.layer.weight")
            }
            Role::Layer(layer, LayerRole::SharedDown) => {
                format!("model.layers.{layer}.shared_mlp.output_linear.weight")
            }
            role => names::tensor_name(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        match tensor {
            ExpertTensor::FusedGateUp => format!("model.layers.{layer}.block_sparse_moe.input_linear.weight"),
            ExpertTensor::FusedDown => format!("model.layers.{layer}.block_sparse_moe.output_linear.weight"),
            // One by one, as quantizers unroll them.
            tensor => names::expert_tensor_name(layer, tensor).replace(".mlp.", ".block_sparse_moe."),
        }
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Fused, ExpertLayout::PerExpert, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Fused
    }

    fn width_key(&self) -> &'static str {
        "intermediate_size"
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_local_experts", "num_experts"]
    }
}
