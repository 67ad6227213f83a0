//! A model under edits, without writing a checkpoint.

use std::sync::Arc;

use moe_checkpoint::ExpertWeights;
use moe_core::{ExpertOverlay, RoutingOverlay};

use crate::{EditSource, Error};

/// Applies edits to experts that already have the plan's width: put it on top of an overlay that drops units
/// ([`EditOverlay::over`]), or on a pruned checkpoint whose indices the edits are in. As a routing overlay, it gives the edited routers.
pub struct EditOverlay {
    base: Option<Arc<dyn ExpertOverlay>>,
    edits: Arc<dyn EditSource>,
}

impl EditOverlay {
    /// The edits alone.
    pub fn new(edits: Arc<dyn EditSource>) -> Self {
        Self { base: None, edits }
    }

    /// The edits on top of another overlay.
    pub fn over(base: Arc<dyn ExpertOverlay>, edits: Arc<dyn EditSource>) -> Self {
        Self { base: Some(base), edits }
    }
}

impl ExpertOverlay for EditOverlay {
    fn apply(&self, layer: usize, expert: usize, mut weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        if let Some(base) = &self.base {
            weights = base.apply(layer, expert, weights)?;
        }
        let edit = self.edits.expert(layer, expert).map_err(moe_core::Error::overlay)?.unwrap_or_default();
        let fits = |what: &str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => {
                let reason = format!(
                    "{what} of layer {layer} expert {expert} has {found} values, but it is of {} units: expected {expected}",
                    weights.width
                );
                Err(moe_core::Error::overlay(Error::invalid_edits(reason)))
            }
        };
        if let Some(down) = edit.down {
            fits("down", down.len(), weights.hidden * weights.width)?;
            weights.down = down;
        }
        if let Some(bias) = edit.down_bias {
            fits("the down bias", bias.len(), weights.hidden)?;
            weights.down_bias = Some(bias);
        }
        Ok(weights)
    }
}

impl RoutingOverlay for EditOverlay {
    /// The checkpoint's router where the edited one cannot be read.
    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.edits.router(layer).ok().flatten()
    }
}
