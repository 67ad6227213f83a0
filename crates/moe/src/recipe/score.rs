//! Steps that say what matters: scores, and what is protected.

use std::path::PathBuf;

use moe_checkpoint::ProtectionMask;
use moe_importance::{ScorerConfig, SuperExpertOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Named;
use crate::{Error, Result};

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
