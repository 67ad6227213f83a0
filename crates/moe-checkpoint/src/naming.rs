//! Where the decoder is among the tensors of a checkpoint, and other words for its parts.
//!
//! A family names its tensors as it was released. The same decoder is found under other names: inside a model with
//! other modalities (`model.language_model.`, `language_model.model.`), saved without its head (no prefix), or by the
//! names transformers 5 gives it in memory. Such a checkpoint is read, and written again, by the names it has.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value};

use crate::config::{Ffn, ModelConfig};
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;
use crate::weights::TensorInfo;
use crate::{Error, Result};

/// What stands before `embed_tokens`, `layers` and `norm` in published checkpoints.
const PREFIXES: [&str; 8] = [
    "model.",
    "model.language_model.",
    "language_model.model.",
    "model.language_model.model.",
    "language_model.",
    "thinker.model.",
    "model.text_model.",
    "",
];
/// What the head is called in them.
const HEADS: [&str; 5] =
    ["lm_head.", "language_model.lm_head.", "model.lm_head.", "model.language_model.lm_head.", "thinker.lm_head."];
/// Fields about the whole model that the config of a wrapper may hold in place of that of its text model.
const SHARED: [&str; 6] =
    ["tie_word_embeddings", "quantization_config", "quantization", "dtype", "torch_dtype", "eos_token_id"];
const EMBEDDING: &str = "embed_tokens.weight";
/// Where configs of models with other modalities have that of the text model: keys from the outermost in.
const TEXT_MODELS: [&str; 2] = ["text_config", "thinker_config.text_config"];

/// The config at such a place.
pub(crate) fn inner<'a>(config: &'a Value, place: &str) -> Option<&'a Value> {
    place.split('.').try_fold(config, |config, key| config.get(key))
}

/// The same, to change it.
pub(crate) fn inner_mut<'a>(config: &'a mut Value, place: &str) -> Option<&'a mut Value> {
    place.split('.').try_fold(config, |config, key| config.get_mut(key))
}

/// A family by other names, or inside a wrapper.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Spelling {
    model_type: &'static str,
    /// Place of the text model in the config, in a wrapper that no family of its own describes.
    text_key: Option<&'static str>,
    /// The family's prefix and the one in its place.
    prefix: Option<(String, &'static str)>,
    /// What the head is called.
    head: Option<&'static str>,
    /// Words of the family and those in their place.
    words: &'static [(&'static str, &'static str)],
}

/// A family that names its tensors otherwise.
struct Renamed {
    family: &'static dyn Family,
    spelling: Spelling,
}

/// The one family of a spelling. There are few spellings, and each lives as long as the program, as the families
/// themselves do.
fn interned(family: &'static dyn Family, spelling: Spelling) -> &'static dyn Family {
    static KNOWN: Mutex<BTreeMap<Spelling, &'static Renamed>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    *known.entry(spelling.clone()).or_insert_with(|| Box::leak(Box::new(Renamed { family, spelling })))
}

/// The family of the text model in a wrapper, such as `kimi_k25` around `deepseek_v3`.
pub(crate) fn wrapped(config: &Value, families: &[&'static dyn Family]) -> Option<&'static dyn Family> {
    let (place, text) = TEXT_MODELS.into_iter().find_map(|place| Some((place, inner(config, place)?.as_object()?)))?;
    let find = |name: &str| families.iter().copied().find(|family| family.model_type() == name);
    let named = |config: &Map<String, Value>| config.get("model_type").and_then(Value::as_str).map(str::to_string);
    // Without a `model_type` of its own, the text model is that of the wrapper.
    let own = named(text).or_else(|| Some(format!("{}_text", named(config.as_object()?)?)))?;
    let family = find(&own)?;
    let model_type = family.model_type();
    let spelling = Spelling { model_type, text_key: Some(place), prefix: None, head: None, words: &[] };
    Some(interned(family, spelling))
}

/// The family by the names that the tensors have.
pub(crate) fn of(
    family: &'static dyn Family,
    config: &ModelConfig,
    tensors: &BTreeMap<String, TensorInfo>,
) -> &'static dyn Family {
    let moe = config.layers.iter().position(|layer| matches!(layer.ffn, Ffn::Moe(_)));
    let routes = |family: &dyn Family| {
        moe.is_some_and(|layer| tensors.contains_key(&family.tensor_name(Role::Layer(layer, LayerRole::Router))))
    };
    let family = match routes(family) {
        true => family,
        false => family.dialects().iter().copied().find(|dialect| routes(*dialect)).unwrap_or(family),
    };
    let embedding = family.tensor_name(Role::Embedding);
    let Some(own) = embedding.strip_suffix(EMBEDDING) else { return family };
    let has = |name: &str| tensors.contains_key(name);
    let mut spelling =
        Spelling { model_type: family.model_type(), text_key: None, prefix: None, head: None, words: &[] };
    if !has(&embedding) {
        let other = PREFIXES.into_iter().find(|prefix| has(&format!("{prefix}{EMBEDDING}")));
        spelling.prefix = other.map(|other| (own.to_string(), other));
    }
    if !config.tie_word_embeddings && !has(&family.tensor_name(Role::LmHead)) {
        spelling.head = HEADS.into_iter().find(|head| has(&format!("{head}weight")));
    }
    if let Some(layer) = moe {
        let router = |words| {
            let spelling = Spelling { words, ..spelling.clone() };
            Renamed { family, spelling }.tensor_name(Role::Layer(layer, LayerRole::Router))
        };
        if !has(&router(&[])) {
            spelling.words = family.other_words().iter().find(|words| has(&router(words))).copied().unwrap_or_default();
        }
    }
    let is_plain = spelling.prefix.is_none() && spelling.head.is_none() && spelling.words.is_empty();
    if is_plain { family } else { interned(family, spelling) }
}

impl Renamed {
    /// A name of the family as it is spelled here.
    fn spelled(&self, name: String) -> String {
        let mut name = name;
        for (own, other) in self.spelling.words {
            name = name.replace(own, other);
        }
        match &self.spelling.prefix {
            Some((own, other)) => match name.strip_prefix(own.as_str()) {
                Some(rest) => format!("{other}{rest}"),
                None => name,
            },
            None => name,
        }
    }
}

impl Family for Renamed {
    fn model_type(&self) -> &'static str {
        self.family.model_type()
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let Some(key) = self.spelling.text_key else { return self.family.parse(config, generation) };
        let outer = Fields::new(config, CONFIG)?;
        let expected = "the config of the text model";
        let mut text: Map<String, Value> = match inner(config, key) {
            Some(Value::Object(text)) => text.clone(),
            Some(_) => return Err(outer.invalid(key, expected)),
            None => return Err(outer.missing(key, expected)),
        };
        // The configs around it, the nearest first.
        let ends = key.rmatch_indices('.').map(|(end, _)| &key[..end]);
        let around: Vec<&Value> = ends.filter_map(|place| inner(config, place)).chain([config]).collect();
        let said = |name: &str| around.iter().filter_map(|config| config.get(name)).find(|value| !value.is_null());
        for name in SHARED {
            if let (Some(value), None | Some(Value::Null)) = (said(name), text.get(name)) {
                text.insert(name.to_string(), value.clone());
            }
        }
        // transformers ties by the model around it.
        let tied = "tie_word_embeddings";
        if let Some(value) = said(tied) {
            text.insert(tied.to_string(), value.clone());
        }
        // Fields are named by their place in the whole config.
        let at = |field: String| format!("{key}.{field}");
        self.family.parse(&Value::Object(text), generation).map_err(|error| match error {
            Error::InvalidField { file, field, found, expected } => {
                Error::InvalidField { file, field: at(field), found, expected }
            }
            Error::MissingField { file, field, expected } => Error::MissingField { file, field: at(field), expected },
            other => other,
        })
    }

    fn tensor_name(&self, role: Role) -> String {
        match (role, self.spelling.head) {
            (Role::LmHead, Some(head)) => format!("{head}weight"),
            (Role::LmHeadBias, Some(head)) => format!("{head}bias"),
            _ => self.spelled(self.family.tensor_name(role)),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        self.spelled(self.family.expert_tensor_name(layer, tensor))
    }

    fn identity_expert_tensors(&self) -> bool {
        self.family.identity_expert_tensors()
    }

    fn layouts(&self) -> &'static [ExpertLayout] {
        self.family.layouts()
    }

    fn stock_layout(&self) -> ExpertLayout {
        self.family.stock_layout()
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        self.family.shared_count_key()
    }

    fn shared_follows_width(&self) -> bool {
        self.family.shared_follows_width()
    }

    fn attention_has_experts(&self) -> bool {
        self.family.attention_has_experts()
    }

    fn text_key(&self) -> Option<&'static str> {
        self.spelling.text_key.or(self.family.text_key())
    }

    fn other_words(&self) -> &'static [&'static [(&'static str, &'static str)]] {
        self.family.other_words()
    }

    fn dialects(&self) -> &'static [&'static dyn Family] {
        self.family.dialects()
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        match &self.spelling.prefix {
            None => self.family.layer_of(name),
            Some((own, other)) => self.family.layer_of(&format!("{own}{}", name.strip_prefix(other)?)),
        }
    }

    fn width_key(&self) -> &'static str {
        self.family.width_key()
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        self.family.expert_count_keys()
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        self.family.top_k_keys()
    }

    fn group_count_keys(&self) -> &'static [&'static str] {
        self.family.group_count_keys()
    }

    fn size_keys(&self, role: Role) -> &'static str {
        self.family.size_keys(role)
    }
}

/// What a config that no family describes says of itself, for the question whether it is a Mixture-of-Experts model at
/// all: experts have been called by one of these words in every config so far, at whatever depth.
pub(crate) fn mentions_experts(config: &Value) -> bool {
    match config {
        Value::Object(fields) => fields.iter().any(|(name, value)| {
            name.contains("expert")
                || name.contains("moe")
                || (name == "model_type" && value.as_str().is_some_and(|kind| kind.contains("moe")))
                || mentions_experts(value)
        }),
        Value::Array(items) => items.iter().any(mentions_experts),
        _ => false,
    }
}

/// Names of tensors that tell where a checkpoint comes from that has another name in place of `missing`; empty if
/// nothing does.
pub(crate) fn hint<'a>(missing: &str, names: impl Iterator<Item = &'a String> + Clone) -> String {
    if names.clone().any(|name| name.contains(".switch_mlp.")) {
        return "; `switch_mlp` is how MLX names experts: take the original checkpoint, or convert this one back"
            .to_string();
    }
    if names.clone().any(|name| name.contains(".experts.gate_up_projs.")) {
        return "; the layout with one linear map per expert (`gate_up_projs`, as quantizers unroll gpt-oss) is not read: \
                save the model with fused experts, `mlp.experts.gate_up_proj`"
            .to_string();
    }
    if names.clone().any(|name| [".qweight", ".weight_packed", ".absmax"].iter().any(|word| name.contains(word))) {
        return "; the names are those of quantized weights (GPTQ, AWQ, compressed-tensors or bitsandbytes), but their dtypes or \
                companions are not: take the checkpoint as it was published, or the original one"
            .to_string();
    }
    let prefixed = names.clone().find_map(|name| name.strip_suffix(missing).filter(|prefix| !prefix.is_empty()));
    match prefixed {
        Some(prefix) => {
            let why = match prefix.contains("_orig_mod.") {
                true => " (`torch.compile` adds that: save `model._orig_mod`)",
                false => "",
            };
            format!("; the files have it as `{prefix}{missing}`: rename the tensors without `{prefix}`{why}")
        }
        None => String::new(),
    }
}

/// Fields about quantized weights, at any depth of a config.
const QUANTIZATION: [&str; 3] = ["quantization_config", "quantization", "expert_dtype"];

/// The config without what it says of quantized weights, for weights that are none.
pub(crate) fn without_quantization(mut config: Value) -> Value {
    fn strip(value: &mut Value) {
        if let Value::Object(fields) = value {
            QUANTIZATION.iter().for_each(|key| drop(fields.shift_remove(*key)));
            fields.values_mut().for_each(strip);
        }
    }
    strip(&mut config);
    config
}

/// Whether an error says that weights are quantized by a method that is not read.
pub(crate) fn is_unread_quantization(error: &Error) -> bool {
    matches!(error, Error::Quantized { .. })
}
