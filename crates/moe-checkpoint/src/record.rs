//! How a model came about: a chain of steps, written beside the weights.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Checkpoint, Error, Result};

/// Name of the file in an output directory that tells how the model came about. Stock loaders ignore it.
pub const RECORD_FILE: &str = "moe_record.json";
/// The version that is written, and the newest that is read.
const VERSION: u64 = 1;
/// What the file is called in messages.
const KIND: &str = "model record";

/// What one method did to a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The method, such as `prune` or `merge`.
    pub method: String,
    /// Version of the crates that did it.
    pub crate_version: String,
    /// [Fingerprint](Checkpoint::fingerprint) of the model it was done to.
    pub base: String,
    /// Identifies the outcome, as 64 hex digits: a BLAKE3 hash over the base and the recipe.
    pub digest: String,
    /// What was done, in a sentence for people.
    pub summary: String,
    /// Everything the outcome follows from besides the base, and what the method reports.
    pub recipe: Value,
}

impl Step {
    /// A step on `base` whose outcome follows from `recipe` alone.
    pub fn new(method: &str, base: &Checkpoint, recipe: Value, summary: impl Into<String>) -> Self {
        let base = base.fingerprint();
        let mut hasher = blake3::Hasher::new();
        for part in [method, &base, &recipe.to_string()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self {
            method: method.to_string(),
            crate_version: env!("CARGO_PKG_VERSION").to_string(),
            digest: hasher.finalize().to_hex().to_string(),
            summary: summary.into(),
            base,
            recipe,
        }
    }
}

/// How a model came about: the methods that were applied to a released model, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the file.
    version: u64,
    /// The steps, the first one first.
    pub steps: Vec<Step>,
}

impl Record {
    /// The record of these steps.
    pub fn new(steps: Vec<Step>) -> Self {
        Self { version: VERSION, steps }
    }

    /// Reads the record of a model directory; an empty one where there is none, as in a released model.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::MalformedArtifact`], [`Error::ArtifactVersion`], naming the file.
    pub fn load(directory: impl AsRef<Path>) -> Result<Self> {
        let path = directory.as_ref().join(RECORD_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::new(Vec::new())),
            Err(error) => return Err(Error::io(&path, error)),
        };
        let malformed = |error: serde_json::Error| Error::malformed(&path, KIND, error.to_string());
        let record: Self = serde_json::from_slice(&bytes).map_err(malformed)?;
        if record.version != VERSION {
            let (found, supported) = (record.version, VERSION);
            return Err(Error::ArtifactVersion { path, kind: KIND, found, supported });
        }
        Ok(record)
    }

    /// What the last step of a method said; `None` if there was no such step.
    ///
    /// # Errors
    /// [`Error::MalformedArtifact`] for a step that does not read as `T`.
    pub fn recipe<T: DeserializeOwned>(&self, method: &str) -> Result<Option<T>> {
        let Some(step) = self.steps.iter().rev().find(|step| step.method == method) else { return Ok(None) };
        let malformed = |error: serde_json::Error| {
            Error::malformed(Path::new(RECORD_FILE), KIND, format!("step `{method}`: {error}"))
        };
        T::deserialize(&step.recipe).map(Some).map_err(malformed)
    }
}
