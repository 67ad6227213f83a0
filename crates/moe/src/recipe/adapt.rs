//! The step that changes how a model is run.

use moe_core::adaptive::{RoutingConfig, RunTime};
use moe_core::decode::DecodingConfig;
use moe_core::depth::{DepthConfig, LayerChoice};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Named;
use crate::Result;

/// Changes how the model is run, without other weights or with the same ones written otherwise. What stock loaders can
/// read goes into the model: one number of experts per token, dropped layers, changed norms. The rest stays beside it,
/// in `run_time.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Adapt {
    /// How tokens are routed: a rule by its name, or with its parameters (`{"type": "top_k", "k": 2}`). Thresholds that
    /// it does not say are found on the rows of calibration.
    pub routing: Option<Named>,
    /// Layers that tokens go through: a path such as `0-3,5,5,6a`, or a rule with its parameters
    /// (`{"type": "token_skip", "share": 0.2}`). Scores and routers that it does not say are found on the rows of
    /// calibration.
    #[schemars(with = "Option<Value>")]
    pub layers: Option<DepthConfig>,
    /// Layers that are taken out of the model: `{"type": "angular", "layers": 2}`, by what they change on the rows of
    /// calibration, or `{"type": "list", "layers": [5, 6]}`.
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub drop: Option<LayerChoice>,
    /// How the next token is found, in a way that needs no other model: by name (`self_contrast`, `rewiring`,
    /// `pathways`), or with its parameters. References of pathways are found on the rows of calibration.
    pub decoding: Option<Named>,
    /// How norms are written.
    pub norms: Option<Norms>,
}

/// Norms of a model, written in another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Norms {
    /// The mean is taken out of the residual stream of a model with LayerNorms, which then run as RMSNorms: the same
    /// model but for rounding.
    Fold,
    /// LayerNorm scaling, `1 / sqrt(l)` in layer l from 1, of a model that was trained with it, as plain weights.
    Scale,
}

impl Adapt {
    /// How the model is to be run: all of the step that does not change the model itself.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) for a rule, or a way of decoding, that is unknown.
    pub fn run_time(&self) -> Result<RunTime> {
        let routing = self.routing.as_ref().map(|rule| rule.read::<RoutingConfig>("type", "routing"));
        let decoding = self.decoding.as_ref().map(|way| way.read::<DecodingConfig>("type", "decoding"));
        Ok(RunTime {
            routing: routing.transpose()?,
            layers: self.layers.clone(),
            decoding: decoding.transpose()?,
            fold_norms: self.norms == Some(Norms::Fold),
        })
    }

    /// Whether it looks at how a model runs on rows.
    ///
    /// # Errors
    /// As [`run_time`](Self::run_time).
    pub fn needs_rows(&self) -> Result<bool> {
        Ok(self.run_time()?.needs_rows() || self.drop.as_ref().is_some_and(LayerChoice::needs_rows))
    }
}
