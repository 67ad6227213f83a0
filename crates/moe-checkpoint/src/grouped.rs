//! The config of a grouped checkpoint, whose experts share sets of weights: `docs/grouped-format.md`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::config::{Ffn, ModelConfig};
use crate::families::MAX_SIZE;
use crate::family::CONFIG;
use crate::json::Fields;
use crate::ragged::renamed_architectures;
use crate::{Error, Result};

/// Suffix of `model_type`, so that a stock loader refuses the directory.
const SUFFIX: &str = "_grouped";
/// Key of the object with what was there before and the index maps.
const KEY: &str = "moe_grouped";
/// The version that is written, and the newest that is read.
const VERSION: usize = 1;

/// What a grouped config says beyond the original one, which may be ragged.
pub(crate) struct Grouped {
    /// The config without grouping.
    pub original: Value,
    /// The set of weights of every router row, by decoder layer.
    sets: BTreeMap<usize, Vec<u32>>,
}

impl Grouped {
    /// Reads the grouped part of a config; `None` if there is none.
    pub fn read(config: &Value) -> Result<Option<Self>> {
        let fields = Fields::new(config, CONFIG)?;
        let original_type = fields.string("model_type")?.and_then(|name| name.strip_suffix(SUFFIX));
        let (grouped, original_type) = match (fields.object(KEY)?, original_type) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(fields.conflict("model_type", KEY)),
            (None, Some(_)) => {
                return Err(fields.missing(KEY, format!("an object, since `model_type` ends in `{SUFFIX}`")));
            }
            (Some(grouped), Some(original_type)) => (grouped, original_type),
        };
        if grouped.required_integer("version", 1, usize::MAX)? > VERSION {
            return Err(grouped.invalid("version", format!("{VERSION}, the version this crate reads")));
        }
        if grouped.string("model_type")? != Some(original_type) {
            let expected = format!("\"{original_type}\", as in `model_type` less `{SUFFIX}`");
            return Err(grouped.invalid("model_type", expected));
        }
        let layers = grouped.object("expert_sets")?;
        let layers = layers.ok_or_else(|| grouped.missing("expert_sets", "an object from layer to list of sets"))?;
        let mut sets = BTreeMap::new();
        for key in layers.keys() {
            // A canonical number, so that two keys never mean one layer.
            let layer = key.parse::<usize>().ok().filter(|layer| layer.to_string() == key);
            let layer = layer.ok_or_else(|| layers.invalid(key, "decoder layer indices as keys"))?;
            let list = layers.integers(key, 0, MAX_SIZE)?;
            let list = list.ok_or_else(|| layers.invalid(key, "a list of set indices"))?;
            let count = list.iter().max().map_or(0, |largest| largest + 1);
            let mut used = vec![false; count.min(list.len())];
            list.iter().for_each(|set| {
                if let Some(used) = used.get_mut(*set) {
                    *used = true;
                }
            });
            if list.is_empty() || count > list.len() || used.contains(&false) {
                let expected = "set indices of which every one from 0 to the largest occurs";
                return Err(layers.invalid(key, expected));
            }
            sets.insert(layer, list.into_iter().map(|set| set as u32).collect());
        }
        let mut original = config.clone();
        if let Value::Object(map) = &mut original {
            map.insert("model_type".to_string(), Value::String(original_type.to_string()));
            match grouped.value("architectures") {
                Some(architectures) => drop(map.insert("architectures".to_string(), architectures.clone())),
                None => drop(map.shift_remove("architectures")),
            }
            map.shift_remove(KEY);
        }
        Ok(Some(Self { original, sets }))
    }

    /// Puts the index maps into the parsed original config.
    pub fn apply(mut self, config: &mut ModelConfig) -> Result<()> {
        let field = |layer: usize| format!("{KEY}.expert_sets.{layer}");
        let invalid = |layer: usize, found: String, expected: String| Error::InvalidField {
            file: CONFIG.to_string(),
            field: field(layer),
            found,
            expected,
        };
        let (top_k, groups) = (config.routing.top_k, config.routing.groups());
        for (layer, layer_config) in config.layers.iter_mut().enumerate() {
            let Ffn::Moe(moe) = &mut layer_config.ffn else { continue };
            let sets = self.sets.remove(&layer).ok_or_else(|| Error::MissingField {
                file: CONFIG.to_string(),
                field: field(layer),
                expected: "the set of every expert of this MoE layer".to_string(),
            })?;
            let (found, rows) = (format!("a list of {} sets", sets.len()), sets.len());
            if rows < top_k {
                return Err(invalid(layer, found, format!("at least `num_experts_per_tok` = {top_k}")));
            }
            if let Some(groups) = groups.filter(|groups| rows % groups.count != 0) {
                return Err(invalid(layer, found, format!("a multiple of the {} groups of experts", groups.count)));
            }
            if rows > moe.widths.len() {
                return Err(invalid(layer, found, format!("at most the {} experts of the layer", moe.widths.len())));
            }
            if rows < moe.widths.len() {
                // Rows of the router are gone: which experts they were is not said, so their widths must not differ.
                let width = moe.widths[0];
                if moe.widths.iter().any(|other| *other != width) {
                    let expected = format!("one for each of the {} experts, whose widths differ", moe.widths.len());
                    return Err(invalid(layer, found, expected));
                }
                moe.widths.truncate(rows);
            }
            let mut widths: BTreeMap<u32, usize> = BTreeMap::new();
            for (expert, set) in sets.iter().enumerate() {
                let width = *widths.entry(*set).or_insert(moe.widths[expert]);
                if width != moe.widths[expert] {
                    let found = format!("expert {expert} of width {} in set {set}", moe.widths[expert]);
                    return Err(invalid(layer, found, format!("experts of width {width} in that set")));
                }
            }
            moe.sets = Some(sets);
        }
        match self.sets.pop_first() {
            None => Ok(()),
            Some((layer, _)) => Err(invalid(layer, "a list".into(), "sets of MoE layers only".into())),
        }
    }
}

/// The config of a grouped checkpoint: for every MoE layer, the set of weights of each expert, `sets[layer][expert]`,
/// where every set from 0 to the largest is used. A layer may have fewer experts than `config` says: those are then all
/// it has. `config` is that of a stock or a ragged checkpoint. All other keys stay as they are.
///
/// # Errors
/// Those of [`ModelConfig::from_json`] for the result: sets for every MoE layer and for no other, at least `top_k`
/// experts each, experts of one width in a set; and a config that is grouped already.
pub fn grouped_config(config: &Value, sets: &BTreeMap<usize, Vec<u32>>) -> Result<Value> {
    let fields = Fields::new(config, CONFIG)?;
    if Grouped::read(config)?.is_some() {
        return Err(fields.invalid("model_type", "that of a checkpoint which is not grouped yet"));
    }
    // Checked before it is renamed, so that errors name the original.
    ModelConfig::from_json(config, None)?;
    let model_type = fields.string("model_type")?.unwrap_or_default().to_string();
    let architectures = config.get("architectures").cloned().unwrap_or(json!([]));
    let expert_sets: Map<String, Value> = sets.iter().map(|(layer, list)| (layer.to_string(), json!(list))).collect();
    let mut result = config.clone();
    if let Value::Object(map) = &mut result {
        map.insert("model_type".to_string(), Value::String(format!("{model_type}{SUFFIX}")));
        map.insert("architectures".to_string(), renamed_architectures(&architectures, "Grouped"));
        map.insert(
            KEY.to_string(),
            json!({
                "version": VERSION, "model_type": model_type, "architectures": architectures, "expert_sets": expert_sets,
            }),
        );
    }
    ModelConfig::from_json(&result, None)?;
    Ok(result)
}

/// The config of a checkpoint, grouped or not, with these sets instead of its own. Where every expert of every layer
/// has a set of its own and no layer lacks experts, that is the config without grouping.
///
/// # Errors
/// Those of [`grouped_config`] for the result.
pub fn regrouped_config(config: &Value, sets: &BTreeMap<usize, Vec<u32>>) -> Result<Value> {
    let original = ungrouped_config(config)?;
    let whole = ModelConfig::from_json(&original, None)?;
    let own = |(layer, list): (&usize, &Vec<u32>)| {
        let all = whole.moe(*layer).is_some_and(|moe| moe.num_experts() == list.len());
        all && list.iter().enumerate().all(|(expert, set)| expert == *set as usize)
    };
    match sets.iter().all(own) {
        true => Ok(original),
        false => grouped_config(&original, sets),
    }
}

/// The config of a grouped checkpoint as it was before experts shared sets; any other config as it is.
///
/// # Errors
/// Those of [`ModelConfig::from_json`] about the index maps.
pub fn ungrouped_config(config: &Value) -> Result<Value> {
    Ok(Grouped::read(config)?.map_or_else(|| config.clone(), |grouped| grouped.original))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ragged::ragged_config;

    fn stock() -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 8, "vocab_size": 9,
            "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 4, "mlp_only_layers": [0], "intermediate_size": 8,
            "my_key": {"kept": true},
        })
    }

    fn sets(list: &[u32]) -> BTreeMap<usize, Vec<u32>> {
        BTreeMap::from([(1, list.to_vec())])
    }

    #[test]
    fn a_grouped_config_reads_back_and_keeps_unknown_keys() {
        let grouped = grouped_config(&stock(), &sets(&[0, 1, 0, 2])).unwrap();
        assert_eq!(grouped["model_type"], "qwen3_moe_grouped");
        assert_eq!(grouped["architectures"], json!(["Qwen3MoeGroupedForCausalLM"]));
        assert_eq!(grouped["my_key"], json!({"kept": true}));
        assert_eq!(ungrouped_config(&grouped).unwrap(), stock());
        assert_eq!(ungrouped_config(&stock()).unwrap(), stock());
        let config = ModelConfig::from_json(&grouped, None).unwrap();
        let moe = config.moe(1).unwrap();
        assert_eq!((moe.num_experts(), moe.stored(2), moe.stored(3)), (4, 0, 2));
        assert_eq!(*moe.stored_widths(), [4, 4, 4]);
        assert_eq!(config.model_type, "qwen3_moe");
        // Fewer router rows.
        let fewer = grouped_config(&stock(), &sets(&[0, 1, 2])).unwrap();
        assert_eq!(ModelConfig::from_json(&fewer, None).unwrap().moe(1).unwrap().num_experts(), 3);
        assert!(grouped_config(&grouped, &sets(&[0, 1, 0, 2])).unwrap_err().to_string().contains("not grouped yet"));
    }

    #[test]
    fn a_config_whose_experts_get_sets_of_their_own_is_not_grouped_any_more() {
        let grouped = grouped_config(&stock(), &sets(&[0, 1, 0, 2])).unwrap();
        let some = regrouped_config(&grouped, &sets(&[0, 1, 2, 2])).unwrap();
        assert_eq!(some["moe_grouped"]["expert_sets"], json!({"1": [0, 1, 2, 2]}));
        assert_eq!(regrouped_config(&grouped, &sets(&[0, 1, 2, 3])).unwrap(), stock());
        // Rows of the router are gone: only the grouped config can say so.
        let fewer = regrouped_config(&grouped, &sets(&[0, 1, 2])).unwrap();
        assert_eq!(fewer["moe_grouped"]["expert_sets"], json!({"1": [0, 1, 2]}));
    }

    #[test]
    fn a_ragged_config_may_be_grouped() {
        let widths = BTreeMap::from([(1, vec![4, 2, 4, 0])]);
        let ragged = ragged_config(&stock(), &widths, &Default::default()).unwrap();
        let grouped = grouped_config(&ragged, &sets(&[1, 0, 1, 2])).unwrap();
        assert_eq!(grouped["model_type"], "qwen3_moe_ragged_grouped");
        let config = ModelConfig::from_json(&grouped, None).unwrap();
        assert_eq!(*config.moe(1).unwrap().stored_widths(), [2, 4, 0]);
        let message = grouped_config(&ragged, &sets(&[0, 0, 1, 2])).unwrap_err().to_string();
        assert!(message.contains("expert 1 of width 2 in set 0"), "{message}");
        assert!(grouped_config(&ragged, &sets(&[0, 1, 2])).unwrap_err().to_string().contains("widths differ"));
    }

    #[test]
    fn contradictions_are_named() {
        let message = |edit: &dyn Fn(&mut Value)| {
            let mut config = grouped_config(&stock(), &sets(&[0, 1, 0, 2])).unwrap();
            edit(&mut config);
            ModelConfig::from_json(&config, None).unwrap_err().to_string()
        };
        assert!(message(&|c| c["moe_grouped"]["version"] = json!(2)).contains("moe_grouped.version"));
        assert!(message(&|c| c["moe_grouped"]["model_type"] = json!("x")).contains("moe_grouped.model_type"));
        assert!(message(&|c| c["model_type"] = json!("qwen3_moe")).contains("`moe_grouped`"));
        assert!(message(&|c| c["moe_grouped"] = Value::Null).contains("`moe_grouped` is missing"));
        let sets = |value: Value| message(&move |c| c["moe_grouped"]["expert_sets"] = value.clone());
        assert!(sets(json!({})).contains("expert_sets.1` is missing"));
        assert!(sets(json!({"1": [0, 1, 0, 2], "0": [0, 1]})).contains("MoE layers only"));
        assert!(sets(json!({"1": [0]})).contains("num_experts_per_tok"));
        assert!(sets(json!({"1": [0, 1, 2, 3, 4]})).contains("at most the 4"));
        assert!(sets(json!({"1": [0, 2, 0, 2]})).contains("every one from 0"));
        assert!(sets(json!({"1": []})).contains("every one from 0"));
        assert!(sets(json!({"1": [0, 268000000, 1]})).contains("every one from 0"));
        assert!(sets(json!({"01": [0, 1]})).contains("decoder layer indices"));
    }
}
