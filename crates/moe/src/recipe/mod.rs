//! A whole job as one JSON file.

mod adapt;
mod data;
mod decompose;
mod evolve;
mod merge;
mod named;
mod output;
mod prune;
mod published;
mod repair;
mod score;
mod sparsify;
mod tune;

use std::path::{Path, PathBuf};

use moe_core::Precision;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use adapt::{Adapt, Norms};
pub use data::{Data, DataFile, DataRows};
pub use decompose::Decompose;
pub use evolve::Evolve;
pub use merge::Merge;
pub use named::Named;
pub use output::{Evaluate, MixedBits, Quantize, Write};
pub use prune::{Form, Prune};
pub use repair::Repair;
pub use score::{Protect, Score};
pub use sparsify::Sparsify;
pub use tune::{TrainingChanges, Tune};

use crate::jobs::FrontierOptions;
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
    /// How products with weights are computed: `f32`, or `bf16`, which rounds activations once per product.
    #[serde(default, skip_serializing_if = "Precision::is_f32")]
    #[schemars(with = "String")]
    pub precision: Precision,
    /// `default`, `flex` (CPU), `wgpu`, `vulkan` or `cuda`, as far as compiled in.
    #[serde(default = "default_device")]
    pub device: String,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

fn default_device() -> String {
    "default".into()
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
    /// Puts zeros into the weights of experts, on the rows of calibration.
    Sparsify(Sparsify),
    /// Searches for the experts that stay, and for what they are made of, by running the model.
    Evolve(Evolve),
    /// Replaces the matrices of experts by low-rank ones.
    Decompose(Decompose),
    /// Changes how the model as it is now is run: experts per token, layers.
    Adapt(Box<Adapt>),
    /// Measures what is best at a given size, of fewer bits, experts and units of the model as it is now, on the rows
    /// of calibration. The model stays as it is; the report has the figure.
    Frontier(FrontierOptions),
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
            Self::Sparsify(_) => "sparsify",
            Self::Evolve(_) => "evolve",
            Self::Decompose(_) => "decompose",
            Self::Adapt(_) => "adapt",
            Self::Frontier(_) => "frontier",
            Self::Evaluate(_) => "evaluate",
            Self::Write(_) => "write",
        }
    }
}

impl Recipe {
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
