//! Step-3.5 and the text model of Step-3.7: layers with a window that have more heads and a rotary embedding of their
//! own, a gate per head, sigmoid routing with correction bias, SwiGLU whose factors are bounded in some layers.

use serde_json::Value;

use crate::Result;
use crate::config::{
    AttentionConfig, Ffn, LocalAttention, ModelConfig, NormKind, OutputGate, QkNorm, RopeConfig, Routing, RoutingKind,
    SharedExpert,
};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read, rope};

/// The family `step3p5`.
pub(crate) struct Step3p5;

/// Dense layers before the first MoE layer where a config says nothing.
const DENSE: usize = 3;

/// Lists of a config have an entry per decoder layer, and maybe one for each that predicts further tokens.
struct Lists<'a> {
    config: &'a Fields<'a>,
    layers: usize,
    further: usize,
}

impl Lists<'_> {
    /// The entries of the decoder layers.
    fn get(&self, key: &str) -> Result<Option<Vec<Value>>> {
        let Some(found) = self.config.list(key)? else { return Ok(None) };
        if found.len() != self.layers && found.len() != self.layers + self.further {
            let expected = format!("`num_hidden_layers` = {} entries, not {}", self.layers, found.len());
            return Err(self.config.invalid(key, expected));
        }
        Ok(Some(found[..self.layers].to_vec()))
    }

    /// Whether each is the second of these words.
    fn is_second(&self, key: &str, words: [&str; 2]) -> Result<Option<Vec<bool>>> {
        let Some(found) = self.get(key)? else { return Ok(None) };
        let place = |value: &Value| words.iter().position(|word| value.as_str() == Some(word)).map(|place| place == 1);
        let found: Option<Vec<bool>> = found.iter().map(place).collect();
        found.map(Some).ok_or_else(|| self.config.invalid(key, format!("a list of \"{}\"", words.join("\" and \""))))
    }

    /// Bounds, where 0 and null are none.
    fn limits(&self, key: &str) -> Result<Vec<Option<f64>>> {
        let Some(found) = self.get(key)? else { return Ok(vec![None; self.layers]) };
        let limit = |value: &Value| match value {
            Value::Null => Some(None),
            value => value.as_f64().filter(|limit| *limit >= 0.0).map(|limit| Some(limit).filter(|limit| *limit > 0.0)),
        };
        let found: Option<Vec<Option<f64>>> = found.iter().map(limit).collect();
        found.ok_or_else(|| self.config.invalid(key, "a list of numbers of at least 0, and null"))
    }

    /// A number: that of one of the layers in a list, or the one that there is for all.
    fn number(&self, key: &str, layer: usize) -> Result<Option<f64>> {
        let found = match self.config.value(key) {
            Some(Value::Array(_)) => self.get(key)?.and_then(|list| list[layer].as_f64()),
            Some(value) => value.as_f64(),
            None => return Ok(None),
        };
        let found = found.filter(|number| *number > 0.0);
        found.map(Some).ok_or_else(|| self.config.invalid(key, "a number above 0, or a list of one per layer"))
    }
}

impl Step3p5 {
    /// Whether each layer has experts: `mlp_layer_types`, or `moe_layers_enum`, a list or a text of numbers.
    fn is_moe(lists: &Lists<'_>) -> Result<Vec<bool>> {
        if let Some(found) = lists.is_second("mlp_layer_types", ["dense", "sparse"])? {
            return Ok(found);
        }
        let key = "moe_layers_enum";
        let numbers: Option<Vec<usize>> = match lists.config.value(key) {
            None => return Ok((0..lists.layers).map(|layer| layer >= DENSE).collect()),
            Some(Value::String(text)) => {
                let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
                items.map(|item| item.parse().ok()).collect()
            }
            Some(_) => lists.config.integers(key, 0, MAX_SIZE)?,
        };
        let numbers = numbers.ok_or_else(|| lists.config.invalid(key, "layers, separated by commas"))?;
        Ok((0..lists.layers).map(|layer| numbers.contains(&layer)).collect())
    }

    /// The rotary embedding of the layers with a window, or of the others, and how many dimensions it turns.
    fn rope(lists: &Lists<'_>, slides: &[bool], local: bool, head_dim: usize) -> Result<(RopeConfig, usize)> {
        let config = lists.config;
        let max_position = read::size(config, "max_position_embeddings")?;
        let dialect = rope::Dialect { partial: true, llama3: true, ..rope::Dialect::new(max_position) };
        let key = if local { "sliding_attention" } else { "full_attention" };
        let own = match config.object("rope_parameters")? {
            Some(all) => all.object(key)?,
            None => None,
        };
        let (rope, share, named) = match own {
            Some(own) => {
                let share = own.positive_float("partial_rotary_factor")?;
                (rope::of_layers(config, &own, &dialect)?, share, "rope_parameters")
            }
            None => {
                let layer = slides.iter().position(|slides| *slides == local).unwrap_or(0);
                let mut rope = match config.object("rope_scaling")?.filter(|_| !local) {
                    Some(scaling) => rope::of_layers(config, &scaling, &dialect)?,
                    None => {
                        RopeConfig { theta: dialect.theta, interleaved: false, scaling: crate::RopeScaling::Default }
                    }
                };
                if let Some(theta) = lists.number("rope_theta", layer)? {
                    rope.theta = theta;
                }
                (rope, lists.number("partial_rotary_factors", layer)?, "partial_rotary_factors")
            }
        };
        let rotary = (share.unwrap_or(1.0) * head_dim as f64) as usize;
        if rotary == 0 || rotary > head_dim || !rotary.is_multiple_of(2) {
            let expected = format!("fractions of `head_dim` = {head_dim} that give an even number of dimensions");
            return Err(config.invalid(named, expected));
        }
        Ok((rope, rotary))
    }

    /// Query heads of layers with a window.
    fn local_heads(config: &Fields<'_>, slides: &[bool], heads: usize) -> Result<usize> {
        let other = match config.object("attention_other_setting")? {
            Some(other) => other.integer("num_attention_heads", 1, MAX_SIZE)?,
            None => None,
        };
        let local = config.integer("num_sliding_attention_heads", 1, MAX_SIZE)?.or(other).unwrap_or(heads);
        if let Some(per_layer) = config.object("per_layer_config")? {
            for (layer, slides) in slides.iter().enumerate() {
                let expected = if *slides { local } else { heads };
                if let Some(own) = per_layer.object(&layer.to_string())?
                    && own.integer("num_attention_heads", 1, MAX_SIZE)?.is_some_and(|found| found != expected)
                {
                    let expected = format!("{expected} heads in layer {layer}, as in all layers of its kind");
                    return Err(config.invalid("per_layer_config", expected));
                }
            }
        }
        Ok(local)
    }
}

impl Family for Step3p5 {
    fn model_type(&self) -> &'static str {
        "step3p5"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let (layers, further) = (read::num_layers(&config)?, read::mtp_layers(&config)?);
        let lists = Lists { config: &config, layers, further };
        let slides = lists.is_second("layer_types", ["full_attention", "sliding_attention"])?;
        let slides = slides.unwrap_or_else(|| vec![false; layers]);
        let window = read::plain_window(&config)?;
        if slides.contains(&true) && window.is_none() {
            let expected = "a number of tokens, since `layer_types` has sliding layers";
            return Err(config.missing("sliding_window", expected));
        }
        let windows: Vec<Option<usize>> = slides.iter().map(|slides| window.filter(|_| *slides)).collect();
        if config.bool("mlp_bias")?.unwrap_or(false) {
            return Err(config.invalid("mlp_bias", "false, as in all released models"));
        }
        let has = |key: &str| config.value(key).is_some();
        let shared = if has("share_expert_dim") { "share_expert_dim" } else { "share_expert_dims" };
        let shared = config.integer(shared, 0, MAX_SIZE)?.unwrap_or(1280);
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: if has("num_experts_per_tok") { "num_experts_per_tok" } else { "moe_top_k" },
            width_key: self.width_key(),
            bias: false,
            shared: (shared > 0).then(|| SharedExpert::new(shared)),
            is_moe: Self::is_moe(&lists)?,
            why: "`mlp_layer_types`, or `moe_layers_enum`".to_string(),
            windows: &windows,
        };
        let (mut all, top_k) = moe.read(&config)?;
        let bounds = lists.limits("swiglu_limits")?.into_iter().zip(lists.limits("swiglu_limits_shared")?);
        for (index, (layer, (routed, shared))) in all.iter_mut().zip(bounds).enumerate() {
            match &mut layer.ffn {
                Ffn::Moe(moe) => {
                    moe.limit = routed;
                    moe.shared.iter_mut().for_each(|expert| expert.limit = shared);
                }
                _ if shared.is_some() => {
                    let expected = format!("0 in layer {index}, which is dense, as in all released models");
                    return Err(config.invalid("swiglu_limits_shared", expected));
                }
                _ => {}
            }
        }
        let heads = read::size(&config, "num_attention_heads")?;
        let kv = if has("num_key_value_heads") { "num_key_value_heads" } else { "num_attention_groups" };
        let (kv_heads, head_dim) = (read::size(&config, kv)?, read::size(&config, "head_dim")?);
        let local_heads = Self::local_heads(&config, &slides, heads)?;
        if !heads.is_multiple_of(kv_heads) || !local_heads.is_multiple_of(kv_heads) {
            return Err(config.invalid(kv, format!("a divisor of the {heads} and {local_heads} query heads")));
        }
        let bias = config.bool("attention_bias")?.unwrap_or(false);
        let scalar = config.positive_float("query_pre_attn_scalar")?.unwrap_or(head_dim as f64);
        let attention = |heads, rotary_dim| AttentionConfig {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: QkNorm::Head,
            gate: OutputGate::Head,
            rotary_dim,
            scale: Some(scalar.powf(-0.5)),
            ..read::grouped_attention(heads, kv_heads, head_dim)
        };
        let (rope, rotary) = Self::rope(&lists, &slides, false, head_dim)?;
        let (local_rope, local_rotary) = Self::rope(&lists, &slides, true, head_dim)?;
        let kind = RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None };
        let model = read::Model {
            model_type: self.model_type(),
            attention: attention(heads, rotary),
            rope,
            routing: Routing {
                scale: read::scaling(&config, ("moe_router_scaling_factor", 1.0))?,
                norm_eps: 0.0,
                ..Routing::new(top_k, kind)
            },
            layers: all,
        };
        Ok(ModelConfig {
            norm: NormKind::RmsOnePlus,
            norm_eps: config.positive_float("rms_norm_eps")?.unwrap_or(1e-5),
            local: Some(Box::new(LocalAttention { attention: attention(local_heads, local_rotary), rope: local_rope })),
            mtp_layers: further,
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        let Role::Layer(layer, of) = role else { return names::tensor_name(role) };
        let name = match of {
            LayerRole::AttentionGate => "self_attn.g_proj.weight",
            LayerRole::Router => "moe.gate.weight",
            LayerRole::CorrectionBias => "moe.router_bias",
            LayerRole::SharedGate => "share_expert.gate_proj.weight",
            LayerRole::SharedUp => "share_expert.up_proj.weight",
            LayerRole::SharedDown => "share_expert.down_proj.weight",
            _ => return names::tensor_name(role),
        };
        format!("model.layers.{layer}.{name}")
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        let name = match tensor {
            ExpertTensor::StackedGate => "gate_proj.weight",
            ExpertTensor::StackedUp => "up_proj.weight",
            ExpertTensor::FusedDown => "down_proj.weight",
            tensor => return names::expert_tensor_name(layer, tensor).replace(".mlp.", ".moe."),
        };
        format!("model.layers.{layer}.moe.{name}")
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::Stacked, ExpertLayout::Ragged]
    }

    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::Stacked
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "moe_num_experts", "num_local_experts"]
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["num_experts_per_tok", "moe_top_k"]
    }
}
