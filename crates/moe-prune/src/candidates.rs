//! Layers, units, experts and bits as candidates for one budget of bytes.

use std::fmt;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, LayerDrop, ProtectionMask, ScoreTable};
use moe_core::Model;
use moe_core::data::Wave;
use moe_core::depth::LayerChoice;
use serde::{Deserialize, Serialize};

use crate::{Budget, Error, PruneForm, PruneOptions, Pruner, PrunerConfig, Result};

/// What is taken out of a model before its experts are rounded: one of the ways that compete for a budget of bytes, in
/// JSON `{"type": "layers", "choice": {"type": "influence", "layers": 2}}`.
///
/// Each candidate is a model, whose experts get the formats that [`MixedPrecision`](crate::MixedPrecision) finds for it
/// within the bytes; [`best_allocation`](crate::best_allocation) takes the candidate that diverges least then. So "drop
/// two layers" is one more point between size and quality, beside ratios of pruning and bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Candidate {
    /// The model as it is.
    Whole,
    /// Units or experts.
    Pruned {
        /// What goes, by scores.
        pruner: PrunerConfig,
        /// Share of the routed experts' units that goes.
        ratio: f64,
    },
    /// Decoder layers with all that is in them.
    Layers {
        /// Which of them.
        choice: LayerChoice,
    },
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("all layers and experts"),
            Self::Pruned { pruner, ratio } => {
                let recipe = pruner.recipe();
                let of = recipe.get("type").and_then(|name| name.as_str()).unwrap_or_default();
                write!(f, "{:.0}% pruned by `{of}`", 100.0 * ratio)
            }
            Self::Layers { choice } => match choice.count() {
                1 => f.write_str("1 layer less"),
                n => write!(f, "{n} layers less"),
            },
        }
    }
}

impl Candidate {
    /// Whether it looks at scores.
    pub fn needs_scores(&self) -> bool {
        matches!(self, Self::Pruned { .. })
    }

    /// The model that it makes of another, in a form that stock loaders read; layers by what they change on `waves`.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a pruning without scores; what the pruner, the form and the choice of layers
    /// refuse; whatever stops the model.
    pub fn on(&self, model: &Model, scores: Option<&ScoreTable>, waves: &[Wave]) -> Result<Arc<Checkpoint>> {
        let base = model.checkpoint();
        match (self, scores) {
            (Self::Whole, _) => Ok(base.clone()),
            (Self::Layers { choice }, _) => {
                LayerDrop::check_model(base)?;
                let seen = choice.measure(model, waves)?;
                let layers = choice.layers(model.config().layers.len(), seen.as_deref())?;
                Ok(LayerDrop::new(layers).on(base)?)
            }
            (Self::Pruned { .. }, None) => Err(Error::InvalidParameter {
                field: "scores",
                found: "none".into(),
                expected: "a table, by which the pruner of a candidate chooses".into(),
            }),
            (Self::Pruned { pruner, ratio }, Some(scores)) => {
                let budget = Budget::Ratio(*ratio).resolve_as(base, true)?;
                let plan = pruner.prune(scores, base.shape(), budget, &ProtectionMask::none())?.plan;
                Ok(plan.on(base, &PruneOptions::new(PruneForm::Uniform))?.model().clone())
            }
        }
    }
}
