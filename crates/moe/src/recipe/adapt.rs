//! The step that changes how a model is run.

use moe_core::adaptive::RoutingConfig;
use moe_core::depth::{DropRule, LayerPath};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Named;
use crate::Result;

/// Changes how the model is run, without other weights. What stock loaders can read goes into the model: one number of
/// experts per token, dropped layers. The rest stays beside it, in `run_time.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Adapt {
    /// How tokens are routed: a rule by its name, or with its parameters (`{"type": "top_k", "k": 2}`). Thresholds that
    /// it does not say are found on the rows of calibration.
    pub routing: Option<Named>,
    /// Layers that tokens go through, in order, such as `0-3,5,5,6a`.
    #[schemars(with = "Option<String>")]
    pub layers: Option<LayerPath>,
    /// Layers that are taken out of the model: `{"type": "angular", "layers": 2}`, by what they change on the rows of
    /// calibration, or `{"type": "list", "layers": [5, 6]}`.
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub drop: Option<DropRule>,
}

impl Adapt {
    /// The rule that routes.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) for one that is unknown.
    pub fn routing(&self) -> Result<Option<RoutingConfig>> {
        self.routing.as_ref().map(|rule| rule.read("type", "routing")).transpose()
    }
}
