//! The step that improves what the last pruning left.

use moe_prune::repair::{LayerRefit, MeanOutput, Refit, RouterDistillation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
