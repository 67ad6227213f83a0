//! Readers of config fields that several families share.

use serde_json::Value;

use crate::config::{
    Activation, AttentionConfig, AttentionKind, Ffn, GroupScore, Groups, LayerConfig, Mamba, Mixer, ModelConfig,
    MoeConfig, Multipliers, NormKind, NormPlacement, OutputGate, QkNorm, RopeConfig, Routing, RoutingKind,
    SharedExpert,
};
use crate::experts::ExpertBiases;
use crate::formats;
use crate::json::{Fields, integer_in};
use crate::{Error, Result};

/// Largest size of one dimension. Products of two stay far from overflow.
pub(crate) const MAX_SIZE: usize = 1 << 28;
/// Most decoder layers. With [`MAX_EXPERTS`] it bounds what a config can make us allocate.
const MAX_LAYERS: usize = 1 << 12;
/// Most routed experts of one layer.
const MAX_EXPERTS: usize = 1 << 16;
/// Most routed experts of all layers together.
const MAX_ALL_EXPERTS: usize = 1 << 22;

/// A size of at least 1 that must be there.
pub(super) fn size(config: &Fields<'_>, key: &str) -> Result<usize> {
    config.required_integer(key, 1, MAX_SIZE)
}

/// Longest sequence the model is meant for; `model_max_length` in configs without `max_position_embeddings`.
pub(super) fn max_position(config: &Fields<'_>) -> Result<usize> {
    match (config.value("max_position_embeddings"), config.integer("model_max_length", 1, MAX_SIZE)?) {
        (None, Some(length)) => Ok(length),
        _ => size(config, "max_position_embeddings"),
    }
}

/// The number of decoder layers.
pub(super) fn num_layers(config: &Fields<'_>) -> Result<usize> {
    config.required_integer("num_hidden_layers", 1, MAX_LAYERS)
}

/// The number of routed experts, from whichever of `keys` the config has; they must agree.
pub(super) fn num_experts(config: &Fields<'_>, keys: &'static [&'static str]) -> Result<usize> {
    let mut found: Option<(&str, usize)> = None;
    for key in keys {
        let Some(count) = config.integer(key, 0, MAX_EXPERTS)? else { continue };
        match found {
            Some((first, other)) if other != count => return Err(config.conflict(first, key)),
            _ => found = Some((key, count)),
        }
    }
    let expected = || format!("an integer from 1 to {MAX_EXPERTS} (or `{}`)", keys[1..].join("`, `"));
    found.map(|(_, count)| count).ok_or_else(|| config.missing(keys[0], expected()))
}

/// Heads of queries, heads of keys and values, and the width of a head.
pub(super) fn heads(config: &Fields<'_>, hidden_size: usize) -> Result<(usize, usize, usize)> {
    let num_heads = size(config, "num_attention_heads")?;
    let num_kv_heads = config.integer("num_key_value_heads", 1, MAX_SIZE)?.unwrap_or(num_heads);
    if num_heads % num_kv_heads != 0 {
        return Err(config.invalid("num_key_value_heads", format!("a divisor of `num_attention_heads` = {num_heads}")));
    }
    let head_dim = match config.integer("head_dim", 1, MAX_SIZE)? {
        Some(head_dim) => head_dim,
        None if hidden_size >= num_heads => hidden_size / num_heads,
        None => return Err(config.invalid("num_attention_heads", format!("at most `hidden_size` = {hidden_size}"))),
    };
    if head_dim % 2 != 0 {
        let expected = "an even width of a head, which the rotary embedding needs";
        return Err(match config.value("head_dim") {
            Some(_) => config.invalid("head_dim", expected),
            None => {
                config.invalid("hidden_size", format!("{expected}: `hidden_size / num_attention_heads` is {head_dim}"))
            }
        });
    }
    Ok((num_heads, num_kv_heads, head_dim))
}

/// Grouped-query attention of a config's heads, without biases, norms and other extras, the whole head rotated.
pub(super) fn attention(config: &Fields<'_>) -> Result<AttentionConfig> {
    let (num_heads, num_kv_heads, head_dim) = heads(config, size(config, "hidden_size")?)?;
    Ok(grouped_attention(num_heads, num_kv_heads, head_dim))
}

/// The same of these heads.
pub(super) fn grouped_attention(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttentionConfig {
    AttentionConfig {
        kind: AttentionKind::Grouped,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim: head_dim,
        qkv_bias: false,
        output_bias: false,
        qk_norm: QkNorm::None,
        norm_after_rotation: false,
        value_norm: false,
        tied_values: false,
        packed: false,
        gate: OutputGate::None,
        selects: None,
        growth: None,
        qkv_clip: None,
        sinks: false,
        scale: None,
    }
}

/// The activation `hidden_act`; `silu` is the default of transformers.
pub(super) fn activation(config: &Fields<'_>) -> Result<Activation> {
    activation_of(config, "hidden_act", "silu")
}

/// The activation under a key, or as it is without it.
pub(super) fn activation_of(config: &Fields<'_>, key: &str, default: &str) -> Result<Activation> {
    match config.string(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        // Three names of one formula in transformers.
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        _ => Err(config.invalid(key, "\"silu\", \"gelu\" or \"gelu_pytorch_tanh\"")),
    }
}

/// `rms_norm_eps`.
pub(super) fn norm_eps(config: &Fields<'_>) -> Result<f64> {
    Ok(config.positive_float("rms_norm_eps")?.unwrap_or(1e-6))
}

/// `dtype` (transformers 5) or `torch_dtype` (4); they must agree.
pub(super) fn dtype(config: &Fields<'_>) -> Result<Option<String>> {
    let (new, old) = (config.string("dtype")?, config.string("torch_dtype")?);
    match (new, old) {
        (Some(new), Some(old)) if new != old => Err(config.conflict("dtype", "torch_dtype")),
        _ => Ok(new.or(old).map(str::to_string)),
    }
}

/// Ids of the tokens that end a text, from `generation_config.json` where it names them, else from the config.
pub(super) fn eos_token_ids(config: &Fields<'_>, generation: Option<&Value>) -> Result<Vec<u32>> {
    if let Some(generation) = generation {
        let fields = Fields::new(generation, "generation_config.json")?;
        if fields.value("eos_token_id").is_some() {
            return token_ids(&fields, "eos_token_id");
        }
    }
    token_ids(config, "eos_token_id")
}

fn token_ids(fields: &Fields<'_>, key: &str) -> Result<Vec<u32>> {
    let read = |value: &Value| {
        let id = integer_in(value, 0, MAX_SIZE).and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| fields.invalid(key, format!("a token id from 0 to {MAX_SIZE}, or a list of them")))
    };
    match fields.value(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items.iter().map(read).collect(),
        Some(value) => Ok(vec![read(value)?]),
    }
}

/// Routed experts of these widths and a shared one, without extras.
pub(super) fn moe(widths: Vec<usize>, shared: Option<SharedExpert>) -> MoeConfig {
    MoeConfig {
        widths,
        biases: ExpertBiases::None,
        gateless: false,
        sets: None,
        shared,
        limit: None,
        identities: 0,
        by_table: false,
        shortcut: false,
        output_bias: false,
    }
}

/// A layer with attention to all earlier tokens, which rotates.
pub(super) fn plain_layer(ffn: Ffn) -> LayerConfig {
    LayerConfig { sliding_window: None, chunk: None, rotary: true, mixer: Mixer::Attention, keys_of: None, ffn }
}

/// Which layers are MoE layers, and what those hold.
pub(super) struct MoeLayers<'a> {
    /// Config keys of the number of experts.
    pub expert_count_keys: &'static [&'static str],
    /// Config key of the experts per token.
    pub top_k_key: &'static str,
    /// Config key of the width of an expert.
    pub width_key: &'static str,
    /// Whether experts have biases.
    pub bias: bool,
    /// Expert for all tokens.
    pub shared: Option<SharedExpert>,
    /// Whether each layer is an MoE layer.
    pub is_moe: Vec<bool>,
    /// What decides that, for messages.
    pub why: String,
    /// Window of every layer.
    pub windows: &'a [Option<usize>],
}

impl MoeLayers<'_> {
    /// Reads the layers and the number of experts per token.
    pub fn read(self, config: &Fields<'_>) -> Result<(Vec<LayerConfig>, usize)> {
        let layers = self.windows.len();
        let num_experts = num_experts(config, self.expert_count_keys)?;
        let count_key = self.expert_count_keys.iter().find(|key| config.value(key).is_some());
        let count_key = count_key.unwrap_or(&self.expert_count_keys[0]);
        let is_moe = self.is_moe.into_iter().map(|moe| moe && num_experts > 0);
        let is_moe: Vec<bool> = is_moe.collect();
        let moe_layers = is_moe.iter().filter(|moe| **moe).count();
        if moe_layers == 0 {
            let reason = format!("all {layers} layers are dense (`{count_key}` {num_experts}, {})", self.why);
            return Err(Error::NotMoe { file: crate::family::CONFIG.to_string(), reason });
        }
        if num_experts.saturating_mul(moe_layers) > MAX_ALL_EXPERTS {
            let expected = format!("at most {MAX_ALL_EXPERTS} experts in all {moe_layers} MoE layers together");
            return Err(config.invalid(count_key, expected));
        }
        let top_k = config.required_integer(self.top_k_key, 1, num_experts)?;
        let widths = vec![size(config, self.width_key)?; num_experts];
        let biases = if self.bias { ExpertBiases::All } else { ExpertBiases::None };
        let moe = MoeConfig { biases, ..moe(widths, self.shared) };
        let intermediate_size = match moe_layers == layers {
            true => 0,
            false => size(config, "intermediate_size")?,
        };
        let layer = |(is_moe, window): (bool, &Option<usize>)| LayerConfig {
            sliding_window: *window,
            ..plain_layer(match is_moe {
                true => Ffn::Moe(moe.clone()),
                false => Ffn::Dense { intermediate_size, gateless: false },
            })
        };
        Ok((is_moe.into_iter().zip(self.windows).map(layer).collect(), top_k))
    }
}

/// Layers of a family whose layer `i` is an MoE layer iff it is not in `mlp_only_layers` and `decoder_sparse_step`
/// divides `i + 1`.
pub(super) struct SparseLayers<'a> {
    /// Config keys of the number of experts.
    pub expert_count_keys: &'static [&'static str],
    /// Window of every layer.
    pub windows: &'a [Option<usize>],
    /// Expert for all tokens.
    pub shared: Option<SharedExpert>,
}

impl SparseLayers<'_> {
    /// Reads the layers and the number of experts per token.
    pub fn read(self, config: &Fields<'_>) -> Result<(Vec<LayerConfig>, usize)> {
        let layers = self.windows.len();
        let step = config.integer("decoder_sparse_step", 1, MAX_SIZE)?.unwrap_or(1);
        let dense = config.integers("mlp_only_layers", 0, MAX_SIZE)?.unwrap_or_default();
        let layers = MoeLayers {
            expert_count_keys: self.expert_count_keys,
            top_k_key: "num_experts_per_tok",
            width_key: "moe_intermediate_size",
            bias: false,
            shared: self.shared,
            is_moe: (0..layers).map(|i| (i + 1) % step == 0 && !dense.contains(&i)).collect(),
            why: format!("`decoder_sparse_step` {step}, `mlp_only_layers` lists {} layers", dense.len()),
            windows: self.windows,
        };
        layers.read(config)
    }
}

/// Layers of a family without dense ones and without shared experts, whose experts have the width `intermediate_size`.
pub(super) fn all_moe(
    config: &Fields<'_>,
    expert_count_keys: &'static [&'static str],
    bias: bool,
    windows: &[Option<usize>],
) -> Result<(Vec<LayerConfig>, usize)> {
    let layers = MoeLayers {
        expert_count_keys,
        top_k_key: "num_experts_per_tok",
        width_key: "intermediate_size",
        bias,
        shared: None,
        is_moe: vec![true; windows.len()],
        why: "no expert".to_string(),
        windows,
    };
    layers.read(config)
}

/// Layers of a family with `first_k_dense_replace` dense ones, then MoE layers with shared experts, every
/// `moe_layer_freq` layers where that is said.
pub(super) fn first_dense(
    config: &Fields<'_>,
    expert_count_keys: &'static [&'static str],
    shared_count_key: &str,
) -> Result<(Vec<LayerConfig>, usize)> {
    let windows = vec![None; num_layers(config)?];
    dense_then_moe(config, expert_count_keys, shared_count_key, 0, &windows)
}

/// The same with windows and another number of dense layers where the config says nothing. `mlp_layer_types` names the
/// layers in newer configs.
pub(super) fn dense_then_moe(
    config: &Fields<'_>,
    expert_count_keys: &'static [&'static str],
    shared_count_key: &str,
    default_dense: usize,
    windows: &[Option<usize>],
) -> Result<(Vec<LayerConfig>, usize)> {
    let layers = windows.len();
    let dense = config.integer("first_k_dense_replace", 0, MAX_SIZE)?.unwrap_or(default_dense);
    if config.integer("moe_layer_freq", 1, MAX_SIZE)?.is_some_and(|every| every != 1) {
        return Err(config.invalid("moe_layer_freq", "1, as in all released models"));
    }
    let (is_moe, why) = match layer_words(config, "mlp_layer_types", layers, &["dense", "sparse"])? {
        Some(words) => (words.into_iter().map(|word| word == 1).collect(), "`mlp_layer_types`".to_string()),
        None => ((0..layers).map(|layer| layer >= dense).collect(), format!("`first_k_dense_replace` {dense}")),
    };
    let moe = MoeLayers {
        expert_count_keys,
        top_k_key: "num_experts_per_tok",
        width_key: "moe_intermediate_size",
        bias: false,
        shared: shared_experts(config, shared_count_key)?,
        is_moe,
        why,
        windows,
    };
    moe.read(config)
}

/// Whether routing weights are divided by their sum.
pub(crate) enum Renormalize {
    /// If `norm_topk_prob` says so, which is this where it is absent.
    Default(bool),
    /// Whatever a config says.
    Always,
}

impl Renormalize {
    /// What it comes to in a config.
    pub fn read(&self, config: &Fields<'_>) -> Result<bool> {
        match self {
            Self::Default(default) => Ok(config.bool("norm_topk_prob")?.unwrap_or(*default)),
            Self::Always => Ok(true),
        }
    }
}

/// What families have in common that route as DeepSeek-V3 does: dense layers first, then experts that are chosen by the
/// sigmoid of their logits plus a correction bias, from the best groups where there are groups, and shared experts of
/// the width of routed ones.
pub(super) struct Corrected<'a> {
    /// Config keys of the number of experts.
    pub expert_count_keys: &'static [&'static str],
    /// Config key of the number of shared experts.
    pub shared_count_key: &'static str,
    /// Dense layers where a config says nothing.
    pub dense: usize,
    /// Window of every layer.
    pub windows: &'a [Option<usize>],
    /// Whether weights are divided by their sum.
    pub renormalize: Renormalize,
    /// Config key of the factor on the weights, and the factor without it.
    pub scale: (&'static str, f64),
}

impl Corrected<'_> {
    /// Reads the layers and the routing.
    pub fn read(self, config: &Fields<'_>) -> Result<(Vec<LayerConfig>, Routing)> {
        let Self { expert_count_keys, shared_count_key, dense, windows, renormalize, scale } = self;
        let (layers, top_k) = dense_then_moe(config, expert_count_keys, shared_count_key, dense, windows)?;
        let groups = groups(config, experts_of(&layers), top_k, GroupScore::TopTwoSum)?;
        let renormalize = renormalize.read(config)?;
        let kind = RoutingKind::Sigmoid { renormalize, correction_bias: true, groups };
        Ok((layers, Routing { scale: scaling(config, scale)?, ..Routing::new(top_k, kind) }))
    }
}

/// The factor on routing weights, under its key or as it is without it.
pub(super) fn scaling(config: &Fields<'_>, (key, default): (&str, f64)) -> Result<f32> {
    Ok(config.positive_float(key)?.unwrap_or(default) as f32)
}

/// Most heads of linear attention and of state space layers, and largest of their other sizes, so that products of two
/// fit.
pub(super) const MAX_HEADS: usize = 1 << 14;

/// A state space layer whose groups divide its heads.
pub(super) fn check_mamba(config: &Fields<'_>, mamba: Mamba, groups: &str, heads: &str) -> Result<Mamba> {
    match mamba.heads.is_multiple_of(mamba.groups) {
        true => Ok(mamba),
        false => Err(config.invalid(groups, format!("a divisor of `{heads}` = {}", mamba.heads))),
    }
}

/// A list with one of `words` per layer, as positions in `words`; `None` without the field.
pub(super) fn layer_words(config: &Fields<'_>, key: &str, layers: usize, words: &[&str]) -> Result<Option<Vec<usize>>> {
    let Some(found) = config.list(key)? else { return Ok(None) };
    if found.len() != layers {
        return Err(config.invalid(key, format!("`num_hidden_layers` = {layers} entries, not {}", found.len())));
    }
    let place = |value: &Value| words.iter().position(|word| value.as_str() == Some(word));
    let places: Option<Vec<usize>> = found.iter().map(place).collect();
    places.map(Some).ok_or_else(|| config.invalid(key, format!("a list of \"{}\"", words.join("\" and \""))))
}

/// Windows of a family whose `layer_types` say which layers have `sliding_window`; `sliding(layer)` does where they are
/// absent.
pub(super) fn typed_windows(config: &Fields<'_>, sliding: impl Fn(usize) -> bool) -> Result<Vec<Option<usize>>> {
    let layers = num_layers(config)?;
    let window = plain_window(config)?;
    let words = layer_words(config, "layer_types", layers, &["full_attention", "sliding_attention"])?;
    let slides = words.map_or_else(
        || (0..layers).map(|layer| window.is_some() && sliding(layer)).collect::<Vec<_>>(),
        |words| words.into_iter().map(|word| word == 1).collect(),
    );
    if window.is_none() && slides.contains(&true) {
        return Err(config.missing("sliding_window", "a number of tokens, since `layer_types` has sliding layers"));
    }
    Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
}

/// Layers of multi-token prediction.
pub(super) fn mtp_layers(config: &Fields<'_>) -> Result<usize> {
    let mut layers = None;
    for key in crate::mtp::KEYS {
        layers = layers.or(config.integer(key, 0, MAX_LAYERS)?);
    }
    Ok(layers.unwrap_or(0))
}

/// Shared experts of the width of a routed one each, stored as one.
pub(super) fn shared_experts(config: &Fields<'_>, key: &str) -> Result<Option<SharedExpert>> {
    let count = config.integer(key, 0, MAX_EXPERTS)?.unwrap_or(0);
    let width = size(config, "moe_intermediate_size")?;
    let intermediate_size = count.checked_mul(width).filter(|size| *size <= MAX_SIZE);
    let intermediate_size = intermediate_size
        .ok_or_else(|| config.invalid(key, format!("a product with `moe_intermediate_size` of at most {MAX_SIZE}")))?;
    Ok((count > 0).then_some(SharedExpert::new(intermediate_size)))
}

/// Groups of experts from `n_group` and `topk_group`; `None` where there is one group or no such field.
pub(super) fn groups(
    config: &Fields<'_>,
    num_experts: usize,
    top_k: usize,
    score: GroupScore,
) -> Result<Option<Groups>> {
    groups_of(config, "n_group", num_experts, top_k, score)
}

/// The same with another key for the number of groups.
pub(super) fn groups_of(
    config: &Fields<'_>,
    key: &str,
    num_experts: usize,
    top_k: usize,
    score: GroupScore,
) -> Result<Option<Groups>> {
    let count = config.integer(key, 0, MAX_EXPERTS)?.unwrap_or(1).max(1);
    let top = config.integer("topk_group", 0, MAX_EXPERTS)?.unwrap_or(1).max(1);
    if !num_experts.is_multiple_of(count) {
        return Err(config.invalid(key, format!("a divisor of the number of experts {num_experts}")));
    }
    if top > count {
        return Err(config.invalid("topk_group", format!("at most `{key}` = {count}")));
    }
    let size = num_experts / count;
    if count > 1 && score == GroupScore::TopTwoSum && size < 2 {
        return Err(config.invalid(key, "groups of at least two experts, whose two best rank a group"));
    }
    if top * size < top_k {
        let expected = format!("enough groups of {size} experts for `num_experts_per_tok` = {top_k}");
        return Err(config.invalid("topk_group", expected));
    }
    Ok((count > 1).then_some(Groups { count, top, score }))
}

/// The number of experts of the MoE layers.
pub(super) fn experts_of(layers: &[LayerConfig]) -> usize {
    let counts = layers.iter().filter_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => Some(moe.num_experts()),
        Ffn::Dense { .. } | Ffn::None => None,
    });
    counts.max().unwrap_or(0)
}

/// What differs between families in a [`ModelConfig`]; [`Model::read`] adds what they share.
pub(super) struct Model {
    pub model_type: &'static str,
    pub attention: AttentionConfig,
    pub rope: RopeConfig,
    pub routing: Routing,
    pub layers: Vec<LayerConfig>,
}

impl Model {
    /// The config with RMSNorm, SiLU and no extras.
    pub fn read(self, config: &Fields<'_>, generation: Option<&Value>) -> Result<ModelConfig> {
        Ok(ModelConfig {
            model_type: self.model_type.to_string(),
            hidden_size: size(config, "hidden_size")?,
            vocab_size: size(config, "vocab_size")?,
            norm: NormKind::Rms,
            norm_eps: norm_eps(config)?,
            final_norm_eps: None,
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(false),
            head_bias: false,
            multipliers: Multipliers::default(),
            max_position_embeddings: max_position(config)?,
            hidden_act: activation(config)?,
            attention: self.attention,
            rope: self.rope,
            local: None,
            placement: NormPlacement::Before,
            normed_residual: None,
            layer_scale: false,
            layer_inputs: None,
            streams: None,
            logit_cap: None,
            routing: self.routing,
            expert_latent: None,
            layers: self.layers,
            mtp_layers: 0,
            quantization: formats::quantization(config)?,
            eos_token_ids: eos_token_ids(config, generation)?,
            dtype: dtype(config)?,
        })
    }
}

/// `sliding_window` of a family where a number switches it on by itself.
pub(super) fn plain_window(config: &Fields<'_>) -> Result<Option<usize>> {
    Ok(config.integer("sliding_window", 0, MAX_SIZE)?.filter(|window| *window > 0))
}

/// The window of a config that slides, `None` if it does not: `use_sliding_window` (default false) switches
/// `sliding_window` (default 4096); a window of 0 is none.
pub(super) fn window(config: &Fields<'_>) -> Result<Option<usize>> {
    // Read before the switch is looked at, so that a malformed window is an error either way.
    let window = config.integer("sliding_window", 0, MAX_SIZE)?.unwrap_or(4096);
    let used = config.bool("use_sliding_window")?.unwrap_or(false);
    Ok((used && window > 0).then_some(window))
}
