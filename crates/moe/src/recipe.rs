//! A whole job as one JSON file.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Mtp, ProtectionMask, QuantizeOptions, QuantizedPart, Routing};
use moe_importance::{ScorerConfig, SuperExpertOptions};
use moe_merge::{Amount, CompactTraining, OutputForm};
use moe_peft::MethodConfig;
use moe_prune::repair::{LayerRefit, MeanOutput, Refit, RouterDistillation};
use moe_prune::{Budget, ExpertPruner, PrunerConfig, Scope, UnitPruner};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::eval_file::EvalOptions;
use crate::{Error, Result};

/// A whole job: a model, data, and steps that follow each other. [`run`](crate::run::run) carries it out.
///
/// ```
/// let recipe: moe::recipe::Recipe = serde_json::from_str(r#"{
///     "model": "models/Qwen1.5-MoE-A2.7B",
///     "data": {"calibration": ["my_domain.jsonl"], "eval": ["my_domain_test.jsonl"]},
///     "out": "out/half",
///     "steps": [
///         {"score": {"scorers": ["fisher"]}},
///         {"prune": {"budget": {"ratio": 0.5}, "form": "ragged"}},
///         {"evaluate": {}},
///         {"write": {}}
///     ]
/// }"#)?;
/// assert_eq!(recipe.steps.len(), 4);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it is, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub about: String,
    /// Model directory.
    #[serde(default)]
    pub model: PathBuf,
    /// Rows to calibrate and to measure on.
    #[serde(default)]
    pub data: Data,
    /// Directory for everything that is made: artifacts of steps, the model, a report.
    #[serde(default)]
    pub out: PathBuf,
    /// Seed of every random choice that has none of its own.
    #[serde(default)]
    pub seed: u64,
    /// Memory to stay within, such as `8GiB`. Never changes results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<String>,
    /// `default`, `flex` (CPU), `wgpu`, `vulkan` or `cuda`, as far as compiled in.
    #[serde(default = "default_device")]
    pub device: String,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

fn default_device() -> String {
    "default".into()
}

/// Rows to calibrate and to measure on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Files of rows that scores, evidence and repairs are collected on.
    pub calibration: Vec<DataFile>,
    /// Files named `NAME_test.jsonl` that models are measured on.
    pub eval: Vec<PathBuf>,
    /// Sequences of calibration, at most, over all files.
    pub samples: usize,
    /// Tokens per sequence, at most.
    pub length: usize,
    /// Tokens that go through the model together; part of the numerics, since sums are rounded per wave.
    pub wave_tokens: NonZeroUsize,
    /// Whether prompts count in the loss, or completions alone.
    #[schemars(with = "Value")]
    pub loss: moe_core::data::LossOver,
    /// How rows are read: fields from other columns, and whether bad rows are left out.
    #[serde(skip_serializing_if = "is_plain")]
    #[schemars(with = "Value")]
    pub reading: moe_core::data::Reading,
}

fn is_plain(reading: &moe_core::data::Reading) -> bool {
    *reading == moe_core::data::Reading::default()
}

impl Default for Data {
    fn default() -> Self {
        Self {
            calibration: Vec::new(),
            eval: Vec::new(),
            samples: 128,
            length: 2048,
            wave_tokens: NonZeroUsize::MIN.saturating_add(16383),
            loss: moe_core::data::LossOver::All,
            reading: moe_core::data::Reading::default(),
        }
    }
}

/// A file of rows, by its path alone or with how many of them are taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum DataFile {
    /// The path.
    Path(PathBuf),
    /// The path and more.
    Rows(DataRows),
}

/// Some rows of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataRows {
    /// The file.
    pub path: PathBuf,
    /// Sequences of it, at most; by default its share of [`Data::samples`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Its share of the samples relative to the other files.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

impl DataFile {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Path(path) | Self::Rows(DataRows { path, .. }) => path,
        }
    }

    /// Sequences asked for, and the relative share otherwise.
    pub fn amount(&self) -> (Option<usize>, f64) {
        match self {
            Self::Path(_) => (None, 1.0),
            Self::Rows(rows) => (rows.rows, rows.weight),
        }
    }
}

/// A method by its name, or with its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Named {
    /// The name; parameters as published.
    Name(String),
    /// An object as the method's crate documents it.
    Parameters(serde_json::Map<String, Value>),
}

impl Named {
    /// A name, JSON text, or a file of JSON, whose name ends in `.json`.
    ///
    /// # Errors
    /// Text that begins as JSON but is none, a file that cannot be read.
    pub fn parse(text: &str) -> Result<Self, String> {
        let object = |json: &str| serde_json::from_str(json).map(Self::Parameters).map_err(|error| error.to_string());
        let text = text.trim();
        match (text.starts_with('{'), text.ends_with(".json")) {
            (true, _) => object(text),
            (_, true) => {
                let json = std::fs::read_to_string(text).map_err(|error| format!("{text}: {error}"))?;
                object(&json).map_err(|error| format!("{text}: {error}"))
            }
            _ => Ok(Self::Name(text.to_string())),
        }
    }

    /// The object that names the method by the key `tag`.
    pub fn object(&self, tag: &str) -> serde_json::Map<String, Value> {
        match self {
            Self::Name(name) => serde_json::Map::from_iter([(tag.to_string(), Value::from(name.as_str()))]),
            Self::Parameters(map) => map.clone(),
        }
    }

    /// The method, which the key `tag` names.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name or wrong parameters.
    pub fn read<T: DeserializeOwned>(&self, tag: &str, what: &str) -> Result<T> {
        serde_json::from_value(Value::Object(self.object(tag)))
            .map_err(|error| Error::Usage(format!("{what} {}: {error}", self.shown())))
    }

    fn shown(&self) -> String {
        match self {
            Self::Name(name) => format!("`{name}`"),
            Self::Parameters(map) => Value::Object(map.clone()).to_string(),
        }
    }
}

/// One step of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Scores units or experts of the model as it is now, in one pass.
    Score(Score),
    /// Protects experts or units from all pruning and merging that follows.
    Protect(Protect),
    /// Drops units or experts by scores.
    Prune(Prune),
    /// Merges experts.
    Merge(Merge),
    /// Improves what the last pruning left.
    Repair(Repair),
    /// Fine-tunes the model as it is now.
    Tune(Box<Tune>),
    /// Rounds the weights of the model as it is now to few bits.
    Quantize(Quantize),
    /// Measures the model as it is now.
    Evaluate(Evaluate),
    /// Writes the model as it is now.
    Write(Write),
}

impl Step {
    /// Its name in files and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Score(_) => "score",
            Self::Protect(_) => "protect",
            Self::Prune(_) => "prune",
            Self::Merge(_) => "merge",
            Self::Repair(_) => "repair",
            Self::Tune(_) => "tune",
            Self::Quantize(_) => "quantize",
            Self::Evaluate(_) => "evaluate",
            Self::Write(_) => "write",
        }
    }
}

/// Scores by any number of scorers, from one pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// The scorers.
    pub scorers: Vec<Named>,
    /// Also finds super experts, which a later `protect` may name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub super_experts: Option<Named>,
}

impl Score {
    /// The scorers.
    ///
    /// # Errors
    /// [`Error::Usage`] for one that is unknown.
    pub fn scorers(&self) -> Result<Vec<ScorerConfig>> {
        if self.scorers.is_empty() && self.super_experts.is_none() {
            return Err(Error::Usage("step score: no scorer".into()));
        }
        self.scorers.iter().map(|scorer| scorer.read("type", "scorer")).collect()
    }

    /// How super experts are found.
    ///
    /// # Errors
    /// [`Error::Usage`] for options that are unknown.
    pub fn super_experts(&self) -> Result<Option<SuperExpertOptions>> {
        let Some(named) = &self.super_experts else { return Ok(None) };
        match named {
            Named::Name(name) => match name.as_str() {
                "default" => Ok(Some(SuperExpertOptions::default())),
                "released" => Ok(Some(SuperExpertOptions::released())),
                "reap" => Ok(Some(SuperExpertOptions::reap())),
                other => {
                    Err(Error::Usage(format!("super_experts `{other}`: expected default, released, reap or options")))
                }
            },
            options => options.read("", "super_experts").map(Some),
        }
    }
}

/// What no step may drop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Protect {
    /// The super experts that an earlier score found.
    SuperExperts,
    /// A mask in a file, as `moe score` writes it.
    File(PathBuf),
    /// The mask itself.
    #[schemars(with = "Value")]
    Mask(ProtectionMask),
}

/// Drops units or experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Prune {
    /// Name of a scorer of an earlier score, or a score file; by default the first of the last score.
    pub scores: Option<PathBuf>,
    /// How much is kept.
    #[schemars(with = "Option<Value>")]
    pub budget: Option<Budget>,
    /// What decides.
    pub pruner: Option<Named>,
    /// A saved plan, instead of scores and a pruner.
    pub plan: Option<PathBuf>,
    /// A file with what stays, in the form of a protection mask, instead of scores and a pruner: experts of the layers
    /// that it names go unless it lists them, other layers stay whole.
    pub keep_list: Option<PathBuf>,
    /// A saved plan may be of another model, such as a sibling of the same shape.
    pub rebind: bool,
    /// What becomes of layers that predict further tokens.
    #[schemars(with = "Option<Value>")]
    pub mtp: Option<Mtp>,
    /// What the model looks like.
    pub form: Form,
    /// Pieces of an expert, in the form `fine_grained`.
    pub pieces: Option<usize>,
    /// Pieces per token, in the form `fine_grained`; by default as many as keep what a token computes.
    pub pieces_per_token: Option<usize>,
}

impl Default for Prune {
    fn default() -> Self {
        Self {
            scores: None,
            budget: None,
            pruner: None,
            plan: None,
            keep_list: None,
            rebind: false,
            mtp: None,
            form: Form::Auto,
            pieces: None,
            pieces_per_token: None,
        }
    }
}

impl Prune {
    /// The pruner for a model that routes like this: for `auto` and `uniform` one width per expert where nothing is
    /// said, so that stock loaders read the outcome; else units over the whole model. Whole experts go by as many per
    /// group where the router selects groups first.
    ///
    /// # Errors
    /// [`Error::Usage`] for one that is unknown.
    pub fn pruner(&self, routing: &Routing) -> Result<PrunerConfig> {
        let unit = || match self.form {
            Form::Auto | Form::Uniform => UnitPruner::new(Scope::Expert),
            _ => UnitPruner::new(Scope::Global),
        };
        let Some(pruner) = &self.pruner else {
            return Ok(match self.budget {
                Some(Budget::ExpertsPerLayer(_)) => PrunerConfig::Expert(ExpertPruner::new().for_routing(routing)),
                _ => PrunerConfig::Unit(unit()),
            });
        };
        let mut object = pruner.object("type");
        if object.get("type").is_some_and(|name| name == "unit") && !object.contains_key("allocator") {
            let UnitPruner { allocator, limits } = unit();
            object.insert("allocator".into(), serde_json::json!(allocator));
            let given = object.insert("limits".into(), serde_json::json!(limits));
            if let (Some(Value::Object(limits)), Some(Value::Object(given))) = (object.get_mut("limits"), given) {
                limits.extend(given);
            }
        }
        let read: PrunerConfig = Named::Parameters(object).read("type", "pruner")?;
        Ok(match read {
            PrunerConfig::Expert(expert) if (expert.groups, expert.min_experts) == (1, 0) => {
                PrunerConfig::Expert(expert.for_routing(routing))
            }
            PrunerConfig::Subset(subset) if (subset.groups, subset.min_experts) == (1, 0) => {
                PrunerConfig::Subset(subset.for_routing(routing))
            }
            other => other,
        })
    }
}

/// What a pruned model looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// The smallest that stock loaders read: `uniform` where all experts keep one width, else `fine_grained` where they
    /// can be cut into pieces, else an error that names the other forms.
    #[default]
    Auto,
    /// One width for all experts: loads in stock runtimes.
    Uniform,
    /// Experts as equal pieces: loads in stock runtimes.
    FineGrained,
    /// A width per expert: opens with these crates alone.
    Ragged,
    /// Shapes as they were, zeros for what went: loads in stock runtimes, saves nothing.
    Masked,
}

/// Merges experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// A published recipe by its name, or one of your own.
    pub recipe: Named,
    /// How much goes; by default what the recipe says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Value>")]
    pub amount: Option<Amount>,
    /// What the model looks like.
    #[serde(default = "stock")]
    #[schemars(with = "Value")]
    pub form: OutputForm,
    /// Tokens of each layer that alignments and least squares see.
    #[serde(default = "sample")]
    pub sample: usize,
    /// What becomes of layers that predict further tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Value>")]
    pub mtp: Option<Mtp>,
    /// How the parts of the merged experts are trained on the rows of calibration, towards the model before (MC-SMoE).
    /// Without it, a recipe that compresses experts does so in closed form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub training: Option<Box<CompactTraining>>,
}

fn stock() -> OutputForm {
    OutputForm::Stock
}

fn sample() -> usize {
    2048
}

impl Merge {
    /// A step of this recipe, for stock loaders.
    pub fn new(recipe: Named) -> Self {
        Self { recipe, amount: None, form: stock(), sample: sample(), mtp: None, training: None }
    }

    /// The recipe, at the amount that is asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] for one that is unknown, [`Error::Merge`] for parts that do not go together.
    pub fn recipe(&self) -> Result<moe_merge::Recipe> {
        let recipe = match &self.recipe {
            Named::Name(name) => moe_merge::Recipe::named(name)?,
            Named::Parameters(map) => moe_merge::Recipe::from_json(&Value::Object(map.clone()).to_string())?,
        };
        Ok(match self.amount {
            Some(amount) => recipe.with_amount(amount),
            None => recipe,
        })
    }
}

/// Improves what the last pruning left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Repair {
    /// Kept down columns, each expert for itself, in closed form.
    Refit(#[schemars(with = "serde_json::Map<String, Value>")] Refit),
    /// Kept down columns of a layer together, layer after layer.
    LayerRefit(#[schemars(with = "serde_json::Map<String, Value>")] LayerRefit),
    /// A bias per expert: the mean of what the dropped units gave.
    MeanOutput(#[schemars(with = "serde_json::Map<String, Value>")] MeanOutput),
    /// Router rows, by descent on the divergence from the full model.
    RouterDistillation(#[schemars(with = "serde_json::Map<String, Value>")] Box<RouterDistillation>),
}

impl Repair {
    /// The repair.
    pub fn repair(&self) -> &dyn moe_prune::repair::Repair {
        match self {
            Self::Refit(repair) => repair,
            Self::LayerRefit(repair) => repair,
            Self::MeanOutput(repair) => repair,
            Self::RouterDistillation(repair) => &**repair,
        }
    }
}

/// Fine-tunes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tune {
    /// A method by its name, with its parameters (`{"type": "lora", "r": 8}`), or a whole recipe of fine-tuning
    /// (`{"method": {"type": "lora"}, "train": {"clip": 0.5}}`).
    pub method: Named,
    /// Rows to train on; by default those of calibration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<DataFile>,
    /// Field of the rows that has their label, for methods that go by the task or type of a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// Sequences, at most; by default as many as are calibrated on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Optimizer steps, instead of those that the method is trained with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Highest learning rate, instead of the published one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Tokens of an optimizer step, about.
    #[serde(default = "step_tokens")]
    pub step_tokens: NonZeroUsize,
    /// Whether prompts count in the loss, or completions alone.
    #[serde(default = "completions")]
    #[schemars(with = "Value")]
    pub loss: moe_core::data::LossOver,
    /// Whether a LoRA goes into the weights, or stays an adapter beside the model. A mixture always stays one: it
    /// depends on its input.
    #[serde(default = "yes")]
    pub fold: bool,
    /// Steps between saved states.
    #[serde(default = "save_every")]
    pub save_every: NonZeroUsize,
}

fn step_tokens() -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(511)
}

fn save_every() -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(49)
}

fn completions() -> moe_core::data::LossOver {
    moe_core::data::LossOver::Completions
}

fn yes() -> bool {
    true
}

impl Tune {
    /// A step of this method, on the rows of calibration, as published.
    pub fn new(method: Named) -> Self {
        Self {
            method,
            data: Vec::new(),
            labels: None,
            samples: None,
            steps: None,
            learning_rate: None,
            step_tokens: step_tokens(),
            loss: completions(),
            fold: true,
            save_every: save_every(),
        }
    }

    /// What is trained and how, with what the step says of it.
    ///
    /// # Errors
    /// [`Error::Usage`] for a method that is unknown, [`Error::Peft`] for options out of range.
    pub fn recipe(&self, seed: u64) -> Result<moe_peft::Recipe> {
        let mut recipe = match &self.method {
            Named::Name(name) => moe_peft::Recipe::named(name).map_err(|error| Error::Usage(error.to_string()))?,
            Named::Parameters(map) if map.contains_key("method") => self.method.read("", "tune")?,
            Named::Parameters(_) => self.method.read::<moe_peft::MethodConfig>("type", "method")?.into(),
        };
        recipe.train.max_steps = self.steps.or(recipe.train.max_steps);
        recipe.train.schedule.peak = self.learning_rate.unwrap_or(recipe.train.schedule.peak);
        if seed != 0 {
            recipe.set_seed(seed);
        }
        if self.labels.is_some() {
            recipe.labels.clone_from(&self.labels);
        }
        recipe.train.validate().map_err(moe_peft::Error::from)?;
        if !self.fold && !matches!(recipe.method, MethodConfig::Lora(_) | MethodConfig::Mixture(_)) {
            return Err(Error::Usage(
                "fold: false, but the method trains the weights themselves; LoRA and mixtures are adapters".into(),
            ));
        }
        Ok(recipe)
    }

    /// Whether it goes on with the mixture that a step before trained: it has a mixture of the same experts to start
    /// from, and says none.
    ///
    /// # Errors
    /// Those of [`Tune::recipe`].
    pub fn starts_from_mixture(&self, seed: u64) -> Result<bool> {
        Ok(matches!(self.recipe(seed)?.method, MethodConfig::Mixture(config) if config.start.is_none()))
    }

    /// Whether something stays beside the weights afterwards, without which the model is another one.
    pub fn stays_beside(&self, recipe: &moe_peft::Recipe) -> bool {
        let beside = matches!(
            recipe.method,
            MethodConfig::Mixture(_) | MethodConfig::Condensers(_) | MethodConfig::CompressedExperts(_)
        );
        beside || !self.fold
    }
}

/// Rounds the weights to few bits, in the files that engines serve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    /// The format: `fp8_blocks`, `fp8_channels`, `int4`, `int8`, `nvfp4`, `mxfp4`, or one with its parameters
    /// (`{"type": "int", "bits": 4, "group_size": 32}`).
    pub format: Named,
    /// `experts`, or `linear` for shared experts, dense blocks and attention as well.
    #[serde(default)]
    #[schemars(with = "Value")]
    pub part: QuantizedPart,
    /// Whether experts are rounded with error feedback (GPTQ), by the second moments of their inputs on the rows of
    /// calibration.
    #[serde(default)]
    pub calibrated: bool,
}

impl Quantize {
    /// How weights are rounded.
    ///
    /// # Errors
    /// [`Error::Usage`] for a format that is unknown.
    pub fn options(&self) -> Result<QuantizeOptions> {
        let text = match &self.format {
            Named::Name(name) => name.clone(),
            Named::Parameters(map) => Value::Object(map.clone()).to_string(),
        };
        let format = text.parse().map_err(|error: moe_checkpoint::Error| Error::Usage(error.to_string()))?;
        Ok(QuantizeOptions { format, part: self.part })
    }
}

/// Measures the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluate {
    /// Files named `NAME_test.jsonl`; by default those of the recipe.
    pub data: Vec<PathBuf>,
    /// How they are measured.
    #[schemars(with = "serde_json::Map<String, Value>")]
    pub options: EvalOptions,
}

/// Writes the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Write {
    /// Where; by default `model` in the directory of the recipe.
    pub to: Option<PathBuf>,
    /// Most bytes of tensor data per file, such as `5GB`.
    pub shard_size: Option<String>,
}

macro_rules! published {
    ($($name:literal),* $(,)?) => {
        /// Names and texts of the recipes that come with the crate.
        const PUBLISHED: &[(&str, &str)] = &[$(($name, include_str!(concat!("../recipes/", $name, ".json")))),*];
    };
}

published!(
    "fisher-moe",
    "fisher-stock",
    "stun",
    "rate-distortion",
    "reap-25",
    "reap-50",
    "reap-refit",
    "reap-protected",
    "reap-lora",
    "reap-lora-int4",
    "heapr",
    "mone",
    "naee",
    "m-smoe",
    "mc-smoe",
    "hc-smoe",
    "ream",
    "dern",
    "mergemoe",
    "sub-moe",
    "uncurl",
    "uncurl-tune",
    "esft",
    "smt",
    "condensers",
    "lora-mixer",
);

impl Recipe {
    /// Names that [`Recipe::published`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        PUBLISHED.iter().map(|(name, _)| *name)
    }

    /// A published method as a recipe, without model, data and directory.
    ///
    /// # Errors
    /// [`Error::Usage`] lists the names.
    pub fn published(name: &str) -> Result<Self> {
        let found = PUBLISHED.iter().find(|(known, _)| *known == name).ok_or_else(|| {
            let known: Vec<&str> = Self::names().collect();
            Error::Usage(format!("recipe `{name}`: expected a JSON file, or one of {}", known.join(", ")))
        })?;
        serde_json::from_str(found.1).map_err(|error| Error::Invalid(format!("recipe {name}: {error}")))
    }

    /// The JSON Schema of recipes, for editors and other programs.
    pub fn schema() -> Value {
        schemars::schema_for!(Recipe).to_value()
    }

    /// Reads a recipe.
    ///
    /// # Errors
    /// A file that cannot be read or is no recipe, naming the field.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
    }
}
