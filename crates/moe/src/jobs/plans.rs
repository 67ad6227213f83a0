//! Saved plans, for the model they were made for or a sibling of it.

use std::path::Path;

use moe_checkpoint::Checkpoint;
use moe_merge::MergePlan;
use moe_prune::PrunePlan;
use serde_json::Value;

use crate::{Error, Result};

/// A saved plan.
#[derive(Clone, Debug)]
pub enum SavedPlan {
    /// Of pruning.
    Prune(PrunePlan),
    /// Of merging.
    Merge(MergePlan),
}

impl SavedPlan {
    /// Reads a plan of either kind.
    ///
    /// # Errors
    /// A file that cannot be read or is no plan.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?;
        Ok(match value.get("kept").is_some() {
            true => Self::Prune(PrunePlan::load(path)?),
            false => Self::Merge(MergePlan::load(path)?),
        })
    }

    /// Fingerprint of the model that it is of.
    pub fn model(&self) -> &str {
        match self {
            Self::Prune(plan) => &plan.model,
            Self::Merge(plan) => &plan.model,
        }
    }

    /// The plan as one of this model, whose layers and experts must be shaped as those it was made for: base and chat
    /// model, FP8 and BF16. The plan itself, if it is of this model already.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn rebound(mut self, model: &Checkpoint) -> Result<Self> {
        match &mut self {
            Self::Prune(plan) if !model.is_model(&plan.model) => {
                plan.validate(model.shape())?;
                plan.model = model.fingerprint();
            }
            Self::Merge(plan) if !model.is_model(&plan.model) => {
                plan.validate(model.shape())?;
                plan.model = model.fingerprint();
            }
            Self::Prune(_) | Self::Merge(_) => {}
        }
        Ok(self)
    }
}

/// A saved plan of pruning, rebound to this model if that is asked for.
///
/// # Errors
/// A file that cannot be read or is no such plan; shapes that differ.
pub fn prune_plan(path: &Path, model: &Checkpoint, rebind: bool) -> Result<PrunePlan> {
    let plan = SavedPlan::Prune(PrunePlan::load(path)?);
    match if rebind { plan.rebound(model)? } else { plan } {
        SavedPlan::Prune(plan) => Ok(plan),
        SavedPlan::Merge(_) => Err(Error::Invalid(format!("{}: a plan of merging", path.display()))),
    }
}
