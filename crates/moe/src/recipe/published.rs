//! The recipes that come with the crate.

use super::Recipe;
use crate::{Error, Result};

macro_rules! published {
    ($($name:literal),* $(,)?) => {
        /// Names and texts of the recipes that come with the crate.
        const PUBLISHED: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../recipes/", $name, ".json")))),*];
    };
}

published!(
    "fisher-moe",
    "fisher-stock",
    "less-is-moe-router",
    "less-is-moe-gradients",
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
    "moe-slimming",
    "moe-pruner",
    "moe-i2",
    "eep",
    "shape",
    "naee",
    "m-smoe",
    "mc-smoe",
    "hc-smoe",
    "reap-sequential",
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
}
