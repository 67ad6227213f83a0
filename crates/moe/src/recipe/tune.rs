//! The step that fine-tunes.

use std::num::NonZeroUsize;

use moe_checkpoint::BasePrecision;
use moe_core::train::{Decay, TrainOptions};
use moe_peft::MethodConfig;
use moe_peft::fold::FoldPrecision;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{DataFile, Named};
use crate::{Error, Result};

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
    /// What the base is rounded to while it is trained on (QLoRA): `nf4`, `int4`, `int8`, `fp8`, `mxfp4` or `nvfp4`;
    /// by default it stays what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub base_precision: Option<BasePrecision>,
    /// What quantized weights become when a LoRA goes into them: `bf16`, or `as_base` for the format of the base.
    #[serde(default)]
    #[schemars(with = "String")]
    pub fold_precision: FoldPrecision,
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
            base_precision: None,
            fold_precision: FoldPrecision::default(),
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
        let changes = TrainingChanges { steps: self.steps, learning_rate: self.learning_rate, ..Default::default() };
        changes.apply(&mut recipe.train)?;
        if seed != 0 {
            recipe.set_seed(seed);
        }
        if self.labels.is_some() {
            recipe.labels.clone_from(&self.labels);
        }
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
            MethodConfig::Mixture(_)
                | MethodConfig::Condensers(_)
                | MethodConfig::CompressedExperts(_)
                | MethodConfig::NullExperts(_)
                | MethodConfig::RecurrentRouter(_)
                | MethodConfig::Duo(_)
                | MethodConfig::TokenSkip(_)
                | MethodConfig::LossFree(_)
                | MethodConfig::SmoeDropout(_)
        );
        beside || !self.fold
    }
}

/// What a step or a command line changes of how a method is trained. What it does not say stays as the recipe of the
/// method has it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrainingChanges {
    /// Optimizer steps, at most.
    pub steps: Option<usize>,
    /// Passes over the rows, all of them.
    pub epochs: Option<usize>,
    /// Highest learning rate.
    pub learning_rate: Option<f64>,
    /// Share of the steps in which the rate rises, in [0, 1].
    pub warmup: Option<f64>,
    /// How the rate falls.
    pub decay: Option<Decay>,
    /// Waves whose gradients make a step.
    pub accumulate: Option<usize>,
    /// Steps between evaluations.
    pub evaluate_every: Option<usize>,
    /// Evaluations in a row without a better one that end the training.
    pub patience: Option<usize>,
}

impl TrainingChanges {
    /// Changes the options of a training.
    ///
    /// # Errors
    /// [`Error::Peft`](crate::Error::Peft) names the option that is out of range.
    pub fn apply(&self, train: &mut TrainOptions) -> Result<()> {
        train.max_steps = self.steps.or(train.max_steps);
        if let Some(epochs) = self.epochs {
            (train.epochs, train.max_steps) = (epochs, None);
        }
        let schedule = &mut train.schedule;
        schedule.peak = self.learning_rate.unwrap_or(schedule.peak);
        if let Some(warmup) = self.warmup {
            (schedule.warmup, schedule.warmup_steps) = (warmup, None);
        }
        schedule.decay = self.decay.unwrap_or(schedule.decay);
        train.waves_per_step = self.accumulate.unwrap_or(train.waves_per_step);
        train.evaluate_every = self.evaluate_every.or(train.evaluate_every);
        train.patience = self.patience.or(train.patience);
        Ok(train.validate().map_err(moe_peft::Error::from)?)
    }
}
