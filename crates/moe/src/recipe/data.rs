//! Rows that a recipe calibrates and measures on.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
