//! A whole fine-tuning as one JSON file: the method, losses on routers, and how it is trained.

use std::path::Path;

use moe_core::train::TrainOptions;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::{
    AdapterSet, Error, Installed, MethodConfig, Phase, Result, Setting, TuningMethod, dense_mixer::DenseMixer,
    named_methods::METHODS, peft_files::AdapterConfig, router_loss::RouterLosses,
};

/// What is trained, and how.
///
/// In JSON only `method` has to be there. What stands in `train` changes those fields alone: the others keep what the
/// method is
/// [trained with](MethodConfig::training).
///
/// ```
/// use moe_peft::Recipe;
///
/// let recipe: Recipe = serde_json::from_str(r#"{"method": {"type": "esft", "threshold": 0.3}, "train": {"clip": 0.5}}"#)?;
/// assert_eq!((recipe.train.clip, recipe.train.max_steps), (Some(0.5), Some(500)));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// What is trained.
    pub method: MethodConfig,
    /// Losses on the routers, none by default.
    pub router_losses: RouterLosses,
    /// Whether routers that are trained get the gradient of all experts, as if all had run.
    pub dense_mixer: bool,
    /// The field of the rows that has their label, for methods that go by the task or type of a row.
    pub labels: Option<String>,
    /// How it is trained.
    pub train: TrainOptions,
}

impl From<MethodConfig> for Recipe {
    fn from(method: MethodConfig) -> Self {
        let train = method.training();
        Self { method, router_losses: RouterLosses::default(), dense_mixer: false, labels: None, train }
    }
}

impl<'de> Deserialize<'de> for Recipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            method: MethodConfig,
            #[serde(default)]
            router_losses: RouterLosses,
            #[serde(default)]
            dense_mixer: bool,
            #[serde(default)]
            labels: Option<String>,
            #[serde(default)]
            train: Value,
        }
        let File { method, router_losses, dense_mixer, labels, train } = File::deserialize(deserializer)?;
        let mut recipe = Self { router_losses, dense_mixer, labels, ..method.into() };
        recipe.change_training(train).map_err(serde::de::Error::custom)?;
        Ok(recipe)
    }
}

impl Recipe {
    /// The recipe of a [named method](METHODS).
    ///
    /// # Errors
    /// [`Error::Input`] that lists the names.
    pub fn named(name: &str) -> Result<Self> {
        match METHODS.iter().find(|method| method.name == name) {
            Some(method) => Ok((method.config)().into()),
            None => {
                let known: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
                Err(Error::input("method", name, format!("one of {}", known.join(", "))))
            }
        }
    }

    /// A recipe from a file: a whole one, a [method](MethodConfig) alone, or the `adapter_config.json` of PEFT, whose
    /// names are those of transformers 5.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] for a file that cannot be read or is none of these; [`Error::Unsupported`] for
    /// options of PEFT that a new adapter cannot be trained with.
    pub fn load(path: &Path) -> Result<Self> {
        let malformed =
            |error: String| crate::array_file::malformed(path, "contents", error, "a recipe of fine-tuning");
        let text = std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let json: Value = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if json.get("peft_type").is_some() {
            let method = MethodConfig::Lora(Box::new(AdapterConfig::load(path)?.method()?));
            return Ok(method.into());
        }
        let invalid = |error: serde_json::Error| malformed(error.to_string());
        match json.get("type").is_some() {
            true => serde_json::from_value::<MethodConfig>(json).map(Self::from).map_err(invalid),
            // From the text, which says where in it something is wrong.
            false => serde_json::from_slice(&text).map_err(invalid),
        }
    }

    /// Changes the training options that `changes` has, and no others.
    ///
    /// # Errors
    /// [`Error::Input`] for fields or values that there are not.
    pub fn change_training(&mut self, changes: Value) -> Result<()> {
        let invalid = |error: serde_json::Error| Error::input("train", error, "training options");
        let mut train = serde_json::to_value(&self.train).map_err(invalid)?;
        match changes {
            Value::Null => return Ok(()),
            Value::Object(_) => merge(&mut train, changes),
            other => return Err(Error::input("train", other, "an object of training options")),
        }
        self.train = serde_json::from_value(train).map_err(invalid)?;
        Ok(())
    }

    /// Checks that so many processes can share the steps of this recipe, each running other rows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for several, and a method or losses that keep more of a wave than a gradient.
    pub fn check_shareable(&self, processes: usize) -> Result<()> {
        match processes > 1 && !(self.method.is_shareable() && self.router_losses == RouterLosses::default()) {
            true => Err(Error::Unsupported(format!(
                "training by this recipe in {processes} processes: they share the methods own, full, esft and lora \
                 (without CorDA), without losses on routers"
            ))),
            false => Ok(()),
        }
    }

    /// Makes everything random begin with this seed: the order of rows, new adapters, draws of layers.
    pub fn set_seed(&mut self, seed: u64) {
        self.train.seed = seed;
        self.method.set_seed(seed);
    }
}

/// Puts the fields of `changes` in place of those of `value`, objects within objects. An object of another `type`
/// replaces the whole.
fn merge(value: &mut Value, changes: Value) {
    match (value, changes) {
        (Value::Object(fields), Value::Object(changes)) => {
            let other = |tag: &Value| fields.get("type").is_some_and(|own| own != tag);
            if changes.get("type").is_some_and(other) {
                *fields = changes;
                return;
            }
            for (key, change) in changes {
                merge(fields.entry(key).or_insert(Value::Null), change);
            }
        }
        (value, changes) => *value = changes,
    }
}

impl TuningMethod for Recipe {
    /// # Errors
    /// Those of the method and of the losses; [`Error::Input`] for `dense_mixer` with a method that trains no router;
    /// those of [`Setting::check_memory`].
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.train.validate()?;
        on.check_memory()?;
        self.method.check(on)?;
        if self.router_losses != RouterLosses::default() {
            self.router_losses.check(on)?;
        }
        if self.dense_mixer {
            if !self.method.trains_routers() {
                return Err(Error::input(
                    "dense_mixer",
                    true,
                    "false: this method trains no router that it could teach",
                ));
            }
            DenseMixer {}.check(on)?;
        }
        Ok(())
    }

    fn phases(&self, steps: usize) -> Vec<Phase> {
        self.method.phases(steps)
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.method.outline(on, set)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let mut installed = self.method.install(on, set)?;
        if self.router_losses != RouterLosses::default() {
            installed = installed.and(self.router_losses.install(on, set)?);
        }
        if self.dense_mixer {
            installed = installed.and(DenseMixer {}.install(on, set)?);
        }
        Ok(installed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::train::{AdamW, Lion, Optimizer};

    fn recipe(train: &str) -> std::result::Result<Recipe, serde_json::Error> {
        serde_json::from_str(&format!(r#"{{"method": {{"type": "esft"}}, "train": {train}}}"#))
    }

    #[test]
    fn one_field_of_the_training_options_changes_that_field_alone() {
        let plain = recipe("{}").unwrap();
        let published = plain.method.training();
        assert_eq!(plain.train, published);
        let found = recipe(r#"{"clip": 0.5}"#).unwrap().train;
        assert_eq!(found, TrainOptions { clip: Some(0.5), ..published.clone() });
        let found = recipe(r#"{"schedule": {"peak": 0.25}, "optimizer": {"weight_decay": 0}}"#).unwrap().train;
        assert_eq!((found.schedule.peak, found.schedule.decay), (0.25, published.schedule.decay));
        let adamw = AdamW { weight_decay: 0.0, beta2: 0.95, ..AdamW::default() };
        assert_eq!(found.optimizer, Optimizer::AdamW(adamw));
        // another optimizer brings its own fields, none of the one before
        let found = recipe(r#"{"optimizer": {"type": "lion"}, "clip": null, "max_steps": 3}"#).unwrap().train;
        assert_eq!((found.optimizer, found.clip, found.max_steps), (Optimizer::Lion(Lion::default()), None, Some(3)));
        assert!(recipe(r#"{"clap": 1}"#).unwrap_err().to_string().contains("clap"));
        assert!(recipe(r#"{"schedule": {"peek": 1}}"#).unwrap_err().to_string().contains("peek"));
        assert!(recipe("3").unwrap_err().to_string().contains("an object of training options"));
    }

    #[test]
    fn every_name_is_a_recipe_that_can_be_written_and_read() {
        for method in METHODS {
            let recipe = Recipe::named(method.name).unwrap();
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe, "{json}");
            recipe.train.validate().unwrap();
        }
        let error = Recipe::named("prayer").unwrap_err().to_string();
        assert!(error.contains("found prayer") && error.contains("full, esft-token"), "{error}");
        assert_eq!(Recipe::named("esft-gate").unwrap().train.schedule.peak, 1e-5);
    }

    #[test]
    fn a_seed_reaches_new_adapters_and_draws_of_layers() {
        for name in ["lora", "mola", "lisa"] {
            let (mut recipe, plain) = (Recipe::named(name).unwrap(), Recipe::named(name).unwrap());
            recipe.set_seed(7);
            assert_ne!(recipe.method, plain.method, "{name}");
            assert_eq!(recipe.train.seed, 7);
        }
    }

    /// Objects whose keys are the user's own: patterns, numbers of layers.
    const FREE: [&str; 3] = ["rank_pattern", "alpha_pattern", "only"];

    /// The paths of all objects that have fields of their own.
    fn objects(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                if !FREE.iter().any(|free| path.ends_with(free)) {
                    found.push(path.to_owned());
                }
                fields.iter().for_each(|(key, value)| objects(value, &format!("{path}/{key}"), found));
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, value)| objects(value, &format!("{path}/{i}"), found));
            }
            _ => {}
        }
    }

    #[test]
    fn an_unknown_field_is_refused_wherever_it_stands_and_every_tag_is_type() {
        let more = [
            r#"{"method": {"type": "own", "router": true, "only": {"1": [0]}}, "router_losses": {"balance": {"coefficient": 1}, "z": 1}}"#,
            r#"{"method": {"type": "compressed_experts", "experts": {"auxiliary": 1}, "own": {"router": true}}}"#,
            r#"{"method": {"type": "layers", "projection": {"rank": 3}, "sampling": {"weights": {"linear": {"first": 1, "last": 2}}}},
                "train": {"groups": [{"projection": {"rank": 2}}], "explosion": {"factor": 3}, "optimizer": {"type": "lamb"}}}"#,
            r#"{"method": {"type": "condensers", "counts": {"shared": {"total": 3, "cap": 2, "by": {"gini": 2}}}}}"#,
            r#"{"method": {"type": "mixture", "target_modules": ["q_proj"], "gate": {"type": "top1"}, "inference_gate": {"type": "dense"},
                "balance": {"type": "none"}}}"#,
        ];
        let named = METHODS.iter().map(|method| serde_json::to_value(Recipe::named(method.name).unwrap()).unwrap());
        let more = more.iter().map(|json| serde_json::to_value(serde_json::from_str::<Recipe>(json).unwrap()).unwrap());
        let mut tried = 0;
        for json in named.chain(more) {
            assert!(serde_json::from_value::<Recipe>(json.clone()).is_ok());
            let text = json.to_string();
            assert!(["\"kind\":", "\"tag\":", "\"method\":\""].iter().all(|tag| !text.contains(tag)), "{text}");
            let mut paths = Vec::new();
            objects(&json, "", &mut paths);
            for path in paths {
                let mut changed = json.clone();
                changed.pointer_mut(&path).unwrap()["no_such_field"] = 1.into();
                assert!(serde_json::from_value::<Recipe>(changed).is_err(), "{path} takes any field: {json}");
                tried += 1;
            }
        }
        assert!(tried > 150, "{tried}");
    }
}
