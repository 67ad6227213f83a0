//! The config of a ragged checkpoint, whose experts differ in width: `docs/ragged-format.md`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::config::{Ffn, ModelConfig};
use crate::experts::ExpertBiases;
use crate::families::MAX_SIZE;
use crate::family::{CONFIG, family_of};
use crate::json::Fields;
use crate::naming::without_quantization;
use crate::{Error, Result, TopKClamp};

/// Suffix of `model_type`, so that a stock loader refuses the directory.
const SUFFIX: &str = "_ragged";
/// Key of the object with what was there before and the widths.
const KEY: &str = "moe_ragged";
/// Newest version of that object that is read.
const VERSION: usize = 2;
/// Oldest version that says the same where no layer has biases of down alone: what is written then.
const WITHOUT_BIASES: usize = 1;
/// Key of the layers whose experts have a bias of down alone, since version 2.
const BIASES: &str = "down_bias_layers";

/// What a ragged config says beyond the original one.
pub(crate) struct Ragged {
    /// The config of the original model.
    pub original: Value,
    /// Width of every routed expert, by decoder layer.
    widths: BTreeMap<usize, Vec<usize>>,
    /// Decoder layers whose experts have a bias of down alone.
    down_bias: BTreeSet<usize>,
}

impl Ragged {
    /// Reads the ragged part of a config; `None` for a config of a stock model.
    pub fn read(config: &Value) -> Result<Option<Self>> {
        let fields = Fields::new(config, CONFIG)?;
        let original_type = fields.string("model_type")?.and_then(|name| name.strip_suffix(SUFFIX));
        let (ragged, original_type) = match (fields.object(KEY)?, original_type) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(fields.conflict("model_type", KEY)),
            (None, Some(_)) => {
                return Err(fields.missing(KEY, format!("an object, since `model_type` ends in `{SUFFIX}`")));
            }
            (Some(ragged), Some(original_type)) => (ragged, original_type),
        };
        let version = ragged.required_integer("version", 1, usize::MAX)?;
        if version > VERSION {
            return Err(ragged.invalid("version", format!("1 to {VERSION}, the versions this crate reads")));
        }
        let biased = ragged.integers(BIASES, 0, MAX_SIZE)?;
        if version == WITHOUT_BIASES && biased.is_some() {
            return Err(ragged.invalid(BIASES, "no such field in version 1"));
        }
        let down_bias = biased.into_iter().flatten().collect();
        if ragged.string("model_type")? != Some(original_type) {
            return Err(
                ragged.invalid("model_type", format!("\"{original_type}\", as in `model_type` less `{SUFFIX}`"))
            );
        }
        let layers = ragged.object("expert_widths")?;
        let layers = layers.ok_or_else(|| ragged.missing("expert_widths", "an object from layer to list of widths"))?;
        let mut widths = BTreeMap::new();
        for key in layers.keys() {
            // A canonical number, so that two keys never mean one layer.
            let layer = key.parse::<usize>().ok().filter(|layer| layer.to_string() == key);
            let layer = layer.ok_or_else(|| layers.invalid(key, "decoder layer indices as keys"))?;
            let list = layers.integers(key, 0, MAX_SIZE)?;
            widths.insert(layer, list.ok_or_else(|| layers.invalid(key, "a list of widths"))?);
        }
        let mut original = config.clone();
        if let Value::Object(map) = &mut original {
            map.insert("model_type".to_string(), Value::String(original_type.to_string()));
            match ragged.value("architectures") {
                Some(architectures) => drop(map.insert("architectures".to_string(), architectures.clone())),
                None => drop(map.shift_remove("architectures")),
            }
            map.shift_remove(KEY);
        }
        Ok(Some(Self { original, widths, down_bias }))
    }

    /// Puts the widths into the parsed original config.
    pub fn apply(mut self, config: &mut ModelConfig) -> Result<()> {
        let field = |layer: usize| format!("{KEY}.expert_widths.{layer}");
        let (top_k, groups) = (config.routing.top_k, config.routing.groups());
        for (layer, layer_config) in config.layers.iter_mut().enumerate() {
            let Ffn::Moe(moe) = &mut layer_config.ffn else { continue };
            let widths = self.widths.remove(&layer).ok_or_else(|| Error::MissingField {
                file: CONFIG.to_string(),
                field: field(layer),
                expected: "the widths of the experts of this MoE layer".to_string(),
            })?;
            if widths.len() < top_k {
                return Err(Error::InvalidField {
                    file: CONFIG.to_string(),
                    field: field(layer),
                    found: format!("a list of {} widths", widths.len()),
                    expected: format!("at least `num_experts_per_tok` = {top_k}"),
                });
            }
            if let Some(groups) = groups.filter(|groups| widths.len() % groups.count != 0) {
                return Err(Error::InvalidField {
                    file: CONFIG.to_string(),
                    field: field(layer),
                    found: format!("a list of {} widths", widths.len()),
                    expected: format!("a multiple of the {} groups of experts", groups.count),
                });
            }
            moe.widths = widths;
            if self.down_bias.remove(&layer) {
                if moe.biases != ExpertBiases::None {
                    return Err(Error::InvalidField {
                        file: CONFIG.to_string(),
                        field: format!("{KEY}.{BIASES}"),
                        found: format!("layer {layer}"),
                        expected: "layers of a model whose experts have no biases of their own".to_string(),
                    });
                }
                moe.biases = ExpertBiases::Down;
            }
        }
        if let Some(layer) = self.down_bias.first() {
            return Err(Error::InvalidField {
                file: CONFIG.to_string(),
                field: format!("{KEY}.{BIASES}"),
                found: format!("layer {layer}"),
                expected: "MoE layers only".to_string(),
            });
        }
        match self.widths.pop_first() {
            None => Ok(()),
            Some((layer, widths)) => Err(Error::InvalidField {
                file: CONFIG.to_string(),
                field: field(layer),
                found: format!("a list of {} widths", widths.len()),
                expected: "widths of MoE layers only".to_string(),
            }),
        }
    }
}

/// The config of a ragged checkpoint with these expert widths per decoder layer, made from the config of a stock model
/// or of another ragged checkpoint. Experts of the layers in `down_bias` have a bias of down and no other, in a model
/// whose experts have none of their own. A token gets no more experts than the smallest layer has ([`TopKClamp`]). All
/// other keys stay as they are.
///
/// # Errors
/// Those of [`ModelConfig::from_json`] for `config`, and the same for the result: widths for every MoE layer and for no
/// other, at least one expert each.
pub fn ragged_config(
    config: &Value,
    widths: &BTreeMap<usize, Vec<usize>>,
    down_bias: &BTreeSet<usize>,
) -> Result<Value> {
    let mut result = match Ragged::read(config)? {
        Some(ragged) => ragged.original,
        None => config.clone(),
    };
    // That of the whole: the family may be the one of the text model inside.
    let family = family_of(&result)?;
    let model_type = result.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
    let top_k = ModelConfig::from_json(&result, None)?.routing.top_k;
    if let Some(clamp) = TopKClamp::of(top_k, widths.values().map(Vec::len))
        && let Value::Object(map) = family.text_config_mut(&mut result)
    {
        for key in family.top_k_keys().iter().filter(|key| map.contains_key(**key)).collect::<Vec<_>>() {
            map.insert(key.to_string(), json!(clamp.after));
        }
    }
    let architectures = result.get("architectures").cloned().unwrap_or(json!([]));
    let expert_widths: Map<String, Value> =
        widths.iter().map(|(layer, list)| (layer.to_string(), json!(list))).collect();
    if let Value::Object(map) = &mut result {
        map.insert("model_type".to_string(), Value::String(format!("{model_type}{SUFFIX}")));
        map.insert("architectures".to_string(), renamed_architectures(&architectures, "Ragged"));
        let version = if down_bias.is_empty() { WITHOUT_BIASES } else { VERSION };
        let mut ragged = json!({
            "version": version, "model_type": model_type, "architectures": architectures, "expert_widths": expert_widths,
        });
        if !down_bias.is_empty() {
            ragged[BIASES] = json!(down_bias);
        }
        map.insert(KEY.to_string(), ragged);
    }
    ModelConfig::from_json(&result, None)?;
    Ok(result)
}

/// Names of architectures with `word` before `ForCausalLM`.
pub(crate) fn renamed_architectures(architectures: &Value, word: &str) -> Value {
    let names = architectures.as_array().into_iter().flatten().filter_map(Value::as_str);
    let renamed = names.map(|name| {
        Value::String(match name.strip_suffix("ForCausalLM") {
            Some(stem) => format!("{stem}{word}ForCausalLM"),
            None => format!("{name}{word}"),
        })
    });
    Value::Array(renamed.collect())
}

/// What a stock config says about routed experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UniformShape {
    /// Width of every routed expert.
    pub width: usize,
    /// Routed experts of every MoE layer; `None` leaves the config's.
    pub experts: Option<usize>,
    /// Shared experts in families that count them in widths of a routed one; `None` leaves the config's.
    pub shared_experts: Option<usize>,
    /// Routed experts per token; `None` leaves the config's.
    pub top_k: Option<usize>,
    /// Number of groups of experts, and of those selected; `None` leaves the config's.
    pub groups: Option<(usize, usize)>,
    /// Whether attention is given as many experts, where a config has one number for both; otherwise another number is
    /// refused there. See [`Family::attention_has_experts`](crate::Family::attention_has_experts).
    pub attention_follows: bool,
}

/// The config of a stock model whose routed experts all have this width, made from the config of a stock model or of a
/// ragged checkpoint. All other keys stay as they are.
///
/// # Errors
/// Those of [`ModelConfig::from_json`] for `config` and for the result.
pub fn uniform_config(config: &Value, width: usize) -> Result<Value> {
    uniform_shape_config(config, UniformShape { width, ..UniformShape::default() })
}

/// Like [`uniform_config`], with another number of experts, of experts per token and of groups.
///
/// # Errors
/// Those of [`ModelConfig::from_json`] for `config` and for the result, e.g. fewer experts than `num_experts_per_tok`.
pub fn uniform_shape_config(config: &Value, shape: UniformShape) -> Result<Value> {
    let mut result = match Ragged::read(config)? {
        Some(ragged) => ragged.original,
        None => config.clone(),
    };
    let family = family_of(&result)?;
    if family.attention_has_experts() && !shape.attention_follows {
        let fields = Fields::new(&result, CONFIG)?;
        for (keys, value) in [(family.expert_count_keys(), shape.experts), (family.top_k_keys(), shape.top_k)] {
            let is_there = |key: &&&str| fields.value(key).is_some();
            let Some((key, value)) = keys.iter().find(is_there).zip(value) else { continue };
            if fields.value(key).and_then(Value::as_u64) != Some(value as u64) {
                let expected = format!("as it is, not {value}, since attention has as many experts; widths can change");
                return Err(fields.invalid(key, expected));
            }
        }
    }
    if let Value::Object(map) = family.text_config_mut(&mut result) {
        map.insert(family.width_key().to_string(), json!(shape.width));
        // Every key that is there: they must agree.
        for (keys, value) in [(family.expert_count_keys(), shape.experts), (family.top_k_keys(), shape.top_k)] {
            for key in keys.iter().filter(|key| value.is_some() && map.contains_key(**key)).collect::<Vec<_>>() {
                map.insert(key.to_string(), json!(value));
            }
        }
        if let Some((count, top)) = shape.groups {
            let keys = family.group_count_keys();
            let there: Vec<_> = keys.iter().filter(|key| map.contains_key(**key)).collect();
            for key in if there.is_empty() { vec![&keys[0]] } else { there } {
                map.insert(key.to_string(), json!(count));
            }
            map.insert("topk_group".to_string(), json!(top));
        }
        if let (Some(key), Some(count)) = (family.shared_count_key(), shape.shared_experts) {
            map.insert(key.to_string(), json!(count));
        }
    }
    ModelConfig::from_json(&result, None)?;
    Ok(result)
}

/// The config without its quantization, for weights that were dequantized.
pub fn dequantized_config(config: &Value) -> Value {
    let mut result = without_quantization(config.clone());
    if let Value::Object(map) = &mut result {
        for key in ["dtype", "torch_dtype"] {
            if map.get(key).is_some_and(|dtype| dtype.as_str().is_some_and(|name| name.contains("float8"))) {
                map.insert(key.to_string(), json!("bfloat16"));
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stock() -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 8, "vocab_size": 9,
            "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16, "num_experts": 3,
            "num_experts_per_tok": 2, "moe_intermediate_size": 4, "mlp_only_layers": [0], "intermediate_size": 8,
            "my_key": {"kept": true},
        })
    }

    #[test]
    fn a_ragged_config_reads_back_and_keeps_unknown_keys() {
        let widths = BTreeMap::from([(1, vec![4, 0, 2])]);
        let ragged = ragged_config(&stock(), &widths, &BTreeSet::new()).unwrap();
        assert_eq!(ragged["model_type"], "qwen3_moe_ragged");
        assert_eq!(ragged["architectures"], json!(["Qwen3MoeRaggedForCausalLM"]));
        assert_eq!(ragged["my_key"], json!({"kept": true}));
        let config = ModelConfig::from_json(&ragged, None).unwrap();
        assert_eq!(config.moe(1).unwrap().widths, [4, 0, 2]);
        assert_eq!(config.model_type, "qwen3_moe");
        // Again from the ragged one, and back to a stock one.
        assert_eq!(ragged_config(&ragged, &widths, &BTreeSet::new()).unwrap(), ragged);
        let uniform = uniform_config(&ragged, 2).unwrap();
        assert_eq!((&uniform["moe_intermediate_size"], &uniform["model_type"]), (&json!(2), &json!("qwen3_moe")));
        assert_eq!(uniform["architectures"], stock()["architectures"]);
    }

    #[test]
    fn contradictions_are_named() {
        let message = |edit: &dyn Fn(&mut Value)| {
            let mut config = ragged_config(&stock(), &BTreeMap::from([(1, vec![4, 0, 2])]), &BTreeSet::new()).unwrap();
            edit(&mut config);
            ModelConfig::from_json(&config, None).unwrap_err().to_string()
        };
        assert!(message(&|c| c["moe_ragged"]["version"] = json!(3)).contains("moe_ragged.version"));
        assert!(message(&|c| c["moe_ragged"]["model_type"] = json!("x")).contains("moe_ragged.model_type"));
        assert!(message(&|c| c["model_type"] = json!("qwen3_moe")).contains("`moe_ragged`"));
        assert!(message(&|c| c["moe_ragged"] = Value::Null).contains("`moe_ragged` is missing"));
        let widths = |value: Value| message(&move |c| c["moe_ragged"]["expert_widths"] = value.clone());
        assert!(widths(json!({})).contains("moe_ragged.expert_widths.1` is missing"));
        assert!(widths(json!({"1": [1, 2, 3], "0": [1, 2, 3]})).contains("MoE layers only"));
        assert!(widths(json!({"1": [1]})).contains("num_experts_per_tok"));
        assert!(widths(json!({"01": [1, 2]})).contains("decoder layer indices"));
        assert!(widths(json!({"1": [1, -2]})).contains("list of integers"));
        let biases = |version: u64, layers: Value| {
            message(&move |c| {
                c["moe_ragged"]["version"] = json!(version);
                c["moe_ragged"]["down_bias_layers"] = layers.clone();
            })
        };
        assert!(biases(1, json!([1])).contains("no such field in version 1"));
        assert!(biases(2, json!([0])).contains("MoE layers only"));
        assert!(biases(2, json!([-1])).contains("list of integers"));
    }

    #[test]
    fn biases_of_down_need_version_2() {
        let widths = BTreeMap::from([(1, vec![4, 0, 2])]);
        let plain = ragged_config(&stock(), &widths, &BTreeSet::new()).unwrap();
        assert_eq!(plain["moe_ragged"]["version"], 1);
        let biased = ragged_config(&stock(), &widths, &BTreeSet::from([1])).unwrap();
        assert_eq!(biased["moe_ragged"]["version"], 2);
        assert_eq!(biased["moe_ragged"]["down_bias_layers"], json!([1]));
        let config = ModelConfig::from_json(&biased, None).unwrap();
        assert_eq!(config.moe(1).unwrap().biases, ExpertBiases::Down);
        assert!(ragged_config(&stock(), &widths, &BTreeSet::from([0])).is_err());
    }
}
