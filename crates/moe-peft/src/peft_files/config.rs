//! `adapter_config.json`.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Error, Result,
    lora::{Init, LoraConfig, Naming, Patterns, Targets},
};

/// Version of PEFT whose layout is written.
pub(super) const VERSION: &str = "0.21.2";

/// The fields of `adapter_config.json` that are read. Others are tolerated, except set ones that would change the
/// forward pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// `LORA`.
    pub peft_type: String,
    /// Version of PEFT that wrote it.
    pub peft_version: Option<String>,
    /// The model it was trained on.
    pub base_model_name_or_path: Option<String>,
    /// Rank of the additions.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Dropout in training.
    pub lora_dropout: f64,
    /// Modules that are adapted.
    pub target_modules: Option<Targets>,
    /// Parameters that are adapted without being modules, such as fused experts.
    pub target_parameters: Option<Vec<String>>,
    /// Modules left out.
    pub exclude_modules: Option<Targets>,
    /// Layers that are adapted; all, if it is absent.
    #[serde(deserialize_with = "one_or_many")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before the number of a layer.
    #[serde(deserialize_with = "one_or_many")]
    pub layers_pattern: Option<Vec<String>>,
    /// Ranks by pattern.
    pub rank_pattern: Option<Patterns<usize>>,
    /// Alphas by pattern.
    pub alpha_pattern: Option<Patterns<f64>>,
    /// Scale by the root of the rank.
    pub use_rslora: Option<bool>,
    /// Whether magnitudes are trained by themselves (DoRA).
    pub use_dora: Option<bool>,
    /// How it began.
    pub init_lora_weights: Value,
    /// Modules saved whole.
    pub modules_to_save: Option<Vec<String>>,
    /// Which biases of the model were trained: `none`, `all` or `lora_only`.
    pub bias: String,
    /// Whether `B` adds a bias.
    pub lora_bias: bool,
    /// Rows of the embeddings that were trained.
    #[serde(deserialize_with = "token_indices")]
    pub trainable_token_indices: Option<Vec<u32>>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            peft_type: String::new(),
            peft_version: None,
            base_model_name_or_path: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            target_parameters: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: None,
            alpha_pattern: None,
            use_rslora: None,
            use_dora: None,
            init_lora_weights: Value::Bool(true),
            modules_to_save: None,
            bias: "none".into(),
            lora_bias: false,
            trainable_token_indices: None,
        }
    }
}

/// Token indices as a list, or by the name of the embeddings.
fn token_indices<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Vec<u32>>, D::Error> {
    use serde::de::Error as _;
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Indices {
        List(Vec<u32>),
        ByModule(std::collections::BTreeMap<String, Vec<u32>>),
    }
    match Option::<Indices>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Indices::List(list)) => Ok(Some(list)),
        Some(Indices::ByModule(by)) => match by.len() {
            0 | 1 => Ok(by.into_values().next()),
            _ => {
                let names: Vec<String> = by.into_keys().collect();
                let names = names.join(", ");
                Err(D::Error::custom(format!("trainable_token_indices: found {names}, expected the embeddings alone")))
            }
        },
    }
}

fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Vec<T>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(Option::<OneOrMany<T>>::deserialize(deserializer)?.map(|found| match found {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    }))
}

/// Options that change the forward pass and are not implemented, and why they matter.
const REFUSED: [&str; 11] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Initializers after which the adapter is an addition to what the weight kept, not to the weight.
const RESIDUAL: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

impl AdapterConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::File`] for another kind of adapter and a malformed field; [`Error::Unsupported`] names an option that
    /// is set and not implemented.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        let file = |what: &str, found: String, expected: &str| Error::File {
            path: path.to_path_buf(),
            what: what.into(),
            found,
            expected: expected.into(),
        };
        let raw: Value = serde_json::from_str(&text).map_err(|error| file("contents", error.to_string(), "JSON"))?;
        let object = raw.as_object().ok_or_else(|| file("contents", "no object".into(), "an object of options"))?;
        let kind = object.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        if kind != "LORA" {
            return Err(file("peft_type", format!("`{kind}`"), "`LORA`"));
        }
        for field in REFUSED {
            if let Some(value) = object.get(field).filter(|value| is_set(value)) {
                let path = path.display();
                return Err(Error::Unsupported(format!(
                    "{path}: `{field}`: {value}, which changes what the model computes"
                )));
            }
        }
        serde_json::from_value(raw.clone()).map_err(|error| file("a field", error.to_string(), "a value of its kind"))
    }

    /// How the adapter began, if that took something from the weight.
    pub fn residual(&self) -> Option<&str> {
        let init = self.init_lora_weights.as_str()?;
        RESIDUAL.iter().any(|residual| init.to_lowercase().starts_with(residual)).then_some(init)
    }

    /// The same as options of a new adapter, whose names are those of transformers 5.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what PEFT trains besides and this crate trains by other methods.
    pub fn method(&self) -> Result<LoraConfig> {
        let besides = [
            ("bias", (self.bias != "none").then(|| self.bias.clone()), "biases"),
            ("lora_bias", self.lora_bias.then(|| "true".to_string()), "biases"),
        ];
        for (field, value, own) in besides {
            if let Some(value) = value {
                return Err(Error::Unsupported(format!(
                    "`{field}`: {value}: a new adapter trains low-rank additions, `modules_to_save` and `trainable_token_indices`; other \
                     weights of the model are trained by {{\"type\": \"own\"}} ({own})"
                )));
            }
        }
        Ok(self.lora(Naming::Fused))
    }

    /// The same as options of this crate.
    pub fn lora(&self, naming: Naming) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.clone(),
            target_parameters: self.target_parameters.clone().unwrap_or_default(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            rank_pattern: self.rank_pattern.clone().unwrap_or_default(),
            alpha_pattern: self.alpha_pattern.clone().unwrap_or_default(),
            use_rslora: self.use_rslora.unwrap_or(false),
            use_dora: self.use_dora.unwrap_or(false),
            init_lora_weights: Init::try_from(self.init_lora_weights.clone()).unwrap_or(Init::Kaiming),
            modules_to_save: self.modules_to_save.clone().unwrap_or_default(),
            trainable_token_indices: self.trainable_token_indices.clone().unwrap_or_default(),
            naming,
            seed: 0,
        }
    }

    /// Version of PEFT as numbers, of `0.19.1.dev0` three.
    pub fn version(&self) -> Option<(u32, u32, u32)> {
        let mut parts = self.peft_version.as_deref()?.split('.').map(|part| part.parse().ok());
        Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
    }

    /// The file as PEFT writes it: all options, keys sorted.
    pub(super) fn to_json(&self, task_type: &str) -> Value {
        let number = |value: f64| if value.fract() == 0.0 { json!(value as i64) } else { json!(value) };
        let alphas = self.alpha_pattern.as_ref().map(|patterns| {
            patterns.iter().map(|(key, alpha)| (key.to_string(), number(*alpha))).collect::<Map<_, _>>()
        });
        json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": alphas.unwrap_or_default(),
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": self.bias,
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": self.init_lora_weights,
            "layer_replication": null,
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": self.lora_bias,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": self.modules_to_save,
            "peft_type": "LORA",
            "peft_version": VERSION,
            "qalora_group_size": 16,
            "r": self.r,
            "rank_pattern": self.rank_pattern.clone().unwrap_or_default(),
            "revision": null,
            "target_modules": self.target_modules,
            "target_parameters": self.target_parameters,
            "task_type": task_type,
            "trainable_token_indices": self.trainable_token_indices,
            "use_dora": self.use_dora.unwrap_or(false),
            "use_qalora": false,
            "use_rslora": self.use_rslora.unwrap_or(false),
        })
    }
}

/// Whether an option is not at its neutral value.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<AdapterConfig> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_config.json");
        std::fs::write(&path, text).unwrap();
        AdapterConfig::load(&path)
    }

    #[test]
    fn unknown_options_are_tolerated_and_set_ones_that_matter_are_not() {
        let config = load(
            r#"{"peft_type": "LORA", "r": 4, "from_the_future": 3, "layers_to_transform": 2, "lora_bias": false,
                "rank_pattern": {"b": 2, "a": 1}, "loftq_config": {}, "peft_version": "0.19.1.dev0@unknown"}"#,
        )
        .unwrap();
        assert_eq!((config.r, config.layers_to_transform.clone()), (4, Some(vec![2])));
        assert_eq!(config.version(), Some((0, 19, 1)));
        assert_eq!(config.rank_pattern.unwrap().iter().next(), Some(("b", &2)));
        for (field, value) in [
            ("fan_in_fan_out", "true"),
            ("use_qalora", "true"),
            ("kasa_config", "{\"x\": 1}"),
            ("layer_replication", "[[0, 2]]"),
        ] {
            let error = load(&format!(r#"{{"peft_type": "LORA", "{field}": {value}}}"#)).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")) && error.contains("adapter_config.json"), "{error}");
        }
        let read = load(
            r#"{"peft_type": "LORA", "bias": "all", "lora_bias": true, "modules_to_save": ["lm_head"],
                "trainable_token_indices": {"embed_tokens": [3, 5]}}"#,
        )
        .unwrap();
        assert_eq!((&*read.bias, read.lora_bias), ("all", true));
        assert_eq!(read.trainable_token_indices, Some(vec![3, 5]));
        let two = r#"{"peft_type": "LORA", "trainable_token_indices": {"a": [1], "b": [2]}}"#;
        assert!(load(two).unwrap_err().to_string().contains("the embeddings alone"));
        // as options of a new adapter, what cannot be trained is named
        for (field, value) in [("bias", "\"all\""), ("lora_bias", "true")] {
            let config =
                load(&format!(r#"{{"peft_type": "LORA", "target_modules": ["q"], "{field}": {value}}}"#)).unwrap();
            let error = config.method().unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("own"), "{error}");
        }
        let more = r#"{"peft_type": "LORA", "target_modules": ["q"], "modules_to_save": ["lm_head"],
                       "trainable_token_indices": [3]}"#;
        let method = load(more).unwrap().method().unwrap();
        assert_eq!((method.modules_to_save, method.trainable_token_indices), (vec!["lm_head".to_string()], vec![3]));
        let pasted = load(
            r#"{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 3, "target_modules": ["q_proj"],
                "inference_mode": true, "revision": null, "auto_mapping": null, "corda_config": null}"#,
        )
        .unwrap();
        let method = pasted.method().unwrap();
        assert_eq!((method.r, method.naming), (3, Naming::Fused));
        assert!(load(r#"{"peft_type": "IA3"}"#).unwrap_err().to_string().contains("found `IA3`"));
        assert!(load("[]").is_err() && load(r#"{"peft_type": "LORA", "r": "x"}"#).is_err());
    }
}
