//! The step that merges experts.

use moe_checkpoint::Mtp;
use moe_merge::{Amount, CompactTraining, OutputForm};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Named;
use crate::Result;

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
    /// [`Error::Usage`](crate::Error::Usage) for one that is unknown, [`Error::Merge`](crate::Error::Merge) for parts
    /// that do not go together.
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
