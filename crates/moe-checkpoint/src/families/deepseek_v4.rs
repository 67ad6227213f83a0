//! DeepSeek-V4: several residual streams (hyper-connections), attention to compressed keys, first layers that route by
//! a table of the vocabulary, and experts whose gate and up projections are clamped.

use serde_json::Value;

use crate::config::{
    Activation, AttentionConfig, CompressedAttention, CompressedIndexer, Ffn, HyperConnections, KeyCompression,
    LayerConfig, Mixer, ModelConfig, MoeConfig, RopeConfig, RopeScaling, Routing, RoutingKind, SharedExpert,
};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::{Fields, integer_in};
use crate::{Error, Result};

use super::read::MAX_SIZE;
use super::{names, read, rope};

/// The family `deepseek_v4`.
pub(crate) struct DeepseekV4 {
    /// Who gave the tensors their names.
    pub dialect: Dialect,
}

/// Names of tensors.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// As released, without a prefix.
    Released,
    /// As transformers 5.24 saves them: the prefix `model.`, and names of its own outside the layers.
    Saved,
    /// As transformers has them in memory.
    Native,
}

static DIALECTS: [&dyn Family; 2] = [&DeepseekV4 { dialect: Dialect::Saved }, &DeepseekV4 { dialect: Dialect::Native }];

/// Kinds of attention, in the order of `LAYER_TYPES`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Window,
    Sparse,
    Heavy,
}

const KINDS: [Kind; 3] = [Kind::Window, Kind::Sparse, Kind::Heavy];
const LAYER_TYPES: [&str; 3] = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"];

impl DeepseekV4 {
    /// What each layer sees: `layer_types`, else `compress_ratios` (of further layers, too), else what transformers has
    /// where a config says nothing.
    fn kinds(config: &Fields<'_>, layers: usize) -> Result<Vec<Kind>> {
        if let Some(words) = read::layer_words(config, "layer_types", layers, &LAYER_TYPES)? {
            return Ok(words.into_iter().map(|word| KINDS[word]).collect());
        }
        let Some(ratios) = config.list("compress_ratios")? else {
            let kind = |layer: usize| if layer > 1 && layer % 2 == 1 { Kind::Sparse } else { Kind::Heavy };
            return Ok((0..layers).map(kind).collect());
        };
        let expected = format!("0, 4 or 128 for each of {layers} layers");
        let kind = |value: &Value| match integer_in(value, 0, MAX_SIZE)? {
            0 => Some(Kind::Window),
            4 => Some(Kind::Sparse),
            128 => Some(Kind::Heavy),
            _ => None,
        };
        let kinds: Option<Vec<Kind>> = ratios.iter().take(layers).map(kind).collect();
        kinds.filter(|kinds| kinds.len() == layers).ok_or_else(|| config.invalid("compress_ratios", expected))
    }

    /// Which layers route by a table.
    fn by_table(config: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
        if let Some(words) = read::layer_words(config, "mlp_layer_types", layers, &["hash_moe", "moe"])? {
            return Ok(words.into_iter().map(|word| word == 0).collect());
        }
        let count = config.integer("num_hash_layers", 0, MAX_SIZE)?.unwrap_or(3);
        Ok((0..layers).map(|layer| layer < count).collect())
    }

    /// Tokens that become one key in layers of a kind.
    fn rate(config: &Fields<'_>, kind: Kind) -> Result<usize> {
        let (key, old, default) = match kind {
            Kind::Sparse => (LAYER_TYPES[1], "compress_rate_csa", 4),
            _ => (LAYER_TYPES[2], "compress_rate_hca", 128),
        };
        if let Some(rate) = config.integer(old, 1, MAX_SIZE)? {
            return Ok(rate);
        }
        match config.object("compress_rates")? {
            Some(rates) => rates.required_integer(key, 1, MAX_SIZE),
            None => Ok(default),
        }
    }

    /// The rotary embeddings of layers without compressed keys and of those with some, and the columns that turn.
    fn ropes(config: &Fields<'_>, head_dim: usize) -> Result<([RopeConfig; 2], usize)> {
        let max_position = read::size(config, "max_position_embeddings")?;
        let dialect =
            |theta| rope::Dialect { theta, interleaved: true, partial: true, ..rope::Dialect::new(max_position) };
        let theta = |key: &str, default: f64| Ok::<_, Error>(config.positive_float(key)?.unwrap_or(default));
        let thetas = [theta("rope_theta", 10_000.0)?, theta("compress_rope_theta", 160_000.0)?];
        let share = match config.positive_float("partial_rotary_factor")? {
            Some(share) => share,
            None => match config.integer("qk_rope_head_dim", 1, MAX_SIZE)? {
                Some(rotary) => rotary as f64 / head_dim as f64,
                None => 64.0 / 512.0,
            },
        };
        let nested = match config.object("rope_parameters")? {
            Some(all) => all.object("main")?.zip(all.object("compress")?),
            None => None,
        };
        let (ropes, share) = match nested {
            Some((main, compress)) => {
                let share = |fields: &Fields<'_>| {
                    Ok::<_, Error>(fields.positive_float("partial_rotary_factor")?.unwrap_or(1.0))
                };
                let shares = [share(&main)?, share(&compress)?];
                if shares[0] != shares[1] {
                    return Err(
                        config.invalid("rope_parameters", "one `partial_rotary_factor` for `main` and `compress`")
                    );
                }
                let [of_main, of_compress] = thetas.map(dialect);
                let ropes =
                    [rope::of_layers(config, &main, &of_main)?, rope::of_layers(config, &compress, &of_compress)?];
                (ropes, shares[0])
            }
            None => {
                let plain = |theta| RopeConfig { theta, interleaved: true, scaling: RopeScaling::Default };
                let scaling = match config.object("rope_parameters")? {
                    Some(fields) => Some(fields),
                    None => config.object("rope_scaling")?,
                };
                let mut compressed = match scaling {
                    Some(fields) => rope::of_layers(config, &fields, &dialect(thetas[1]))?,
                    None => plain(thetas[1]),
                };
                compressed.theta = thetas[1];
                // The reference multiplies cosine and sine by nothing.
                if let RopeScaling::Yarn { attention_factor, .. } = &mut compressed.scaling {
                    *attention_factor = attention_factor.or(Some(1.0));
                }
                ([plain(thetas[0]), compressed], share)
            }
        };
        let rotary = (share * head_dim as f64) as usize;
        if rotary == 0 || rotary > head_dim || !rotary.is_multiple_of(2) {
            let expected = format!("a share of `head_dim` = {head_dim} that gives an even number of dimensions");
            return Err(config.invalid("partial_rotary_factor", expected));
        }
        Ok((ropes, rotary))
    }

    fn streams(config: &Fields<'_>) -> Result<HyperConnections> {
        Ok(HyperConnections {
            count: config.integer("hc_mult", 1, 64)?.unwrap_or(4),
            iterations: config.integer("hc_sinkhorn_iters", 1, 1 << 10)?.unwrap_or(20),
            eps: config.positive_float("hc_eps")?.unwrap_or(1e-6),
        })
    }
}

impl Family for DeepseekV4 {
    fn model_type(&self) -> &'static str {
        "deepseek_v4"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let layers = read::num_layers(&config)?;
        for (key, only) in [("scoring_func", "sqrtsoftplus"), ("topk_method", "noaux_tc"), ("hidden_act", "silu")] {
            if config.string(key)?.is_some_and(|found| found != only) {
                return Err(config.invalid(key, format!("\"{only}\"")));
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            if config.bool(key)?.unwrap_or(false) {
                return Err(config.invalid(key, "false, as in all released models"));
            }
        }
        for (key, only) in [("num_key_value_heads", 1), ("n_shared_experts", 1)] {
            if config.integer(key, 0, MAX_SIZE)?.is_some_and(|found| found != only) {
                return Err(config.invalid(key, "1"));
            }
        }
        let or = |key, default| Ok::<_, Error>(config.integer(key, 1, MAX_SIZE)?.unwrap_or(default));
        let (heads, head_dim) = (read::size(&config, "num_attention_heads")?, or("head_dim", 512)?);
        let ([main, compress], rotary_dim) = Self::ropes(&config, head_dim)?;
        let output_groups = or("o_groups", 8)?;
        if !heads.is_multiple_of(output_groups) {
            return Err(config.invalid("o_groups", format!("a divisor of `num_attention_heads` = {heads}")));
        }
        let indexer = CompressedIndexer {
            keys: or("index_topk", 512)?,
            heads: or("index_n_heads", 64)?,
            head_dim: or("index_head_dim", 128)?,
        };
        let window = or("sliding_window", 128)?;
        let (kinds, by_table) = (Self::kinds(&config, layers)?, Self::by_table(&config, layers)?);
        if kinds.contains(&Kind::Sparse) && indexer.head_dim < rotary_dim {
            return Err(config.invalid("index_head_dim", format!("at least the {rotary_dim} dimensions that rotate")));
        }
        let attention = |kind: Kind| -> Result<CompressedAttention> {
            let compression = match kind {
                Kind::Window => None,
                Kind::Heavy => Some(KeyCompression { rate: Self::rate(&config, kind)?, indexer: None }),
                Kind::Sparse => {
                    Some(KeyCompression { rate: Self::rate(&config, kind)?, indexer: Some(indexer.clone()) })
                }
            };
            Ok(CompressedAttention {
                heads,
                head_dim,
                rotary_dim,
                query_rank: or("q_lora_rank", 1024)?,
                output_groups,
                output_rank: or("o_lora_rank", 1024)?,
                window,
                rope: if kind == Kind::Window { main.clone() } else { compress.clone() },
                compression,
            })
        };
        let windows = vec![Some(window); layers];
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_tok",
            width_key: self.width_key(),
            bias: false,
            shared: Some(SharedExpert::new(read::size(&config, self.width_key())?)),
            is_moe: vec![true; layers],
            why: "no expert".to_string(),
            windows: &windows,
        };
        let (plain, top_k) = moe.read(&config)?;
        let layer = |((layer, kind), by_table): ((LayerConfig, &Kind), &bool)| -> Result<LayerConfig> {
            let ffn = match layer.ffn {
                Ffn::Moe(moe) => Ffn::Moe(MoeConfig { by_table: *by_table, ..moe }),
                other => other,
            };
            Ok(LayerConfig { mixer: Mixer::Compressed(attention(*kind)?), ffn, ..layer })
        };
        let layers = plain.into_iter().zip(&kinds).zip(&by_table).map(layer).collect::<Result<_>>()?;
        let limit = config.positive_float("swiglu_limit")?.unwrap_or(10.0);
        let model = read::Model {
            model_type: self.model_type(),
            attention: AttentionConfig { rotary_dim, sinks: true, ..read::grouped_attention(heads, 1, head_dim) },
            rope: main,
            // `norm_topk_prob` changes nothing.
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 1.5))?,
                ..Routing::new(top_k, RoutingKind::SqrtSoftplus)
            },
            layers,
        };
        Ok(ModelConfig {
            hidden_act: Activation::LimitedSilu { limit },
            streams: Some(Self::streams(&config)?),
            mtp_layers: read::mtp_layers(&config)?,
            ..model.read(&config, generation)?
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        let native = match role {
            Role::Layer(..) => names::shared_experts(role),
            role => names::tensor_name(role),
        };
        if self.dialect == Dialect::Native {
            return match role {
                Role::Layer(layer, LayerRole::LatentQueryNorm) => {
                    format!("model.layers.{layer}.self_attn.q_a_norm.weight")
                }
                Role::Layer(layer, LayerRole::KeyNorm) => format!("model.layers.{layer}.self_attn.kv_norm.weight"),
                Role::Layer(layer, LayerRole::IndexerQuery) => {
                    format!("model.layers.{layer}.self_attn.compressor.indexer.q_b_proj.weight")
                }
                Role::Layer(layer, LayerRole::IndexerHeads) => {
                    format!("model.layers.{layer}.self_attn.compressor.indexer.scorer.weights_proj.weight")
                }
                _ => native,
            };
        }
        let saved = self.dialect == Dialect::Saved;
        let (layer, role) = match role {
            Role::LmHead => return "head.weight".to_string(),
            _ if saved && !matches!(role, Role::Layer(..)) => return native,
            Role::Embedding => return "embed.weight".to_string(),
            Role::FinalNorm => return "norm.weight".to_string(),
            Role::HeadStreams => return "hc_head_fn".to_string(),
            Role::HeadStreamsBase => return "hc_head_base".to_string(),
            Role::HeadStreamsScale => return "hc_head_scale".to_string(),
            Role::Layer(layer, role) => (layer, role),
            _ => return native,
        };
        let name = match role {
            LayerRole::AttentionNorm => "attn_norm.weight",
            LayerRole::FfnNorm => "ffn_norm.weight",
            LayerRole::AttentionStreams => "hc_attn_fn",
            LayerRole::AttentionStreamsBase => "hc_attn_base",
            LayerRole::AttentionStreamsScale => "hc_attn_scale",
            LayerRole::FfnStreams => "hc_ffn_fn",
            LayerRole::FfnStreamsBase => "hc_ffn_base",
            LayerRole::FfnStreamsScale => "hc_ffn_scale",
            LayerRole::LatentQueryDown => "attn.wq_a.weight",
            LayerRole::LatentQueryNorm => "attn.q_norm.weight",
            LayerRole::LatentQueryUp => "attn.wq_b.weight",
            LayerRole::KeyValue => "attn.wkv.weight",
            LayerRole::KeyNorm => "attn.norm.weight",
            LayerRole::Sinks => "attn.attn_sink",
            LayerRole::OutputGroups => "attn.wo_a.weight",
            LayerRole::OutputJoin => "attn.wo_b.weight",
            LayerRole::CompressorKey => "attn.compressor.wkv.weight",
            LayerRole::CompressorGate => "attn.compressor.wgate.weight",
            LayerRole::CompressorBias => "attn.compressor.ape",
            LayerRole::CompressorNorm => "attn.compressor.norm.weight",
            LayerRole::IndexerQuery => "attn.indexer.wq_b.weight",
            LayerRole::IndexerHeads => "attn.indexer.weights_proj.weight",
            LayerRole::IndexerCompressorKey => "attn.indexer.compressor.wkv.weight",
            LayerRole::IndexerCompressorGate => "attn.indexer.compressor.wgate.weight",
            LayerRole::IndexerCompressorBias => "attn.indexer.compressor.ape",
            LayerRole::IndexerCompressorNorm => "attn.indexer.compressor.norm.weight",
            LayerRole::Router => "ffn.gate.weight",
            LayerRole::CorrectionBias => "ffn.gate.bias",
            LayerRole::ExpertTable => "ffn.gate.tid2eid",
            LayerRole::SharedGate => "ffn.shared_experts.w1.weight",
            LayerRole::SharedUp => "ffn.shared_experts.w3.weight",
            LayerRole::SharedDown => "ffn.shared_experts.w2.weight",
            _ => return native,
        };
        format!("{}layers.{layer}.{name}", if saved { "model." } else { "" })
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        if self.dialect == Dialect::Native {
            return names::expert_tensor_name(layer, tensor);
        }
        let name = names::block_sparse_expert(layer, tensor).replace(".block_sparse_moe.", ".ffn.");
        match (self.dialect, name.strip_prefix("model.")) {
            (Dialect::Released, Some(name)) => name.to_string(),
            _ => name,
        }
    }

    fn dialects(&self) -> &'static [&'static dyn Family] {
        &DIALECTS
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        match self.dialect {
            Dialect::Released => name.strip_prefix("layers.")?.split('.').next()?.parse().ok(),
            _ => names::layer_of(name),
        }
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::PerExpert, ExpertLayout::Fused, ExpertLayout::Ragged]
    }

    fn shared_follows_width(&self) -> bool {
        true
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["n_routed_experts", "num_local_experts"]
    }

    fn size_keys(&self, role: Role) -> &'static str {
        match role {
            Role::Layer(_, LayerRole::LatentQueryUp) => "`num_attention_heads`, `head_dim` and `q_lora_rank`",
            Role::Layer(_, LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown) => {
                "`moe_intermediate_size` and `hidden_size`"
            }
            role => names::size_keys(role),
        }
    }
}
