//! Where scorers read expert weights.

use moe_checkpoint::{Checkpoint, ExpertWeights, LayerRole, Role};

use crate::{Error, Result};

/// Reads the weights of one routed expert or one router at a time. Scorers read experts in parallel and hold one per
/// thread.
pub trait ExpertWeightsSource: Sync {
    /// Weights of an expert; `layer` is the decoder layer index.
    ///
    /// # Errors
    /// No such expert, or weights that cannot be read.
    fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights>;

    /// Router weight of a layer, `[experts, hidden]` row-major; `layer` is the decoder layer index.
    ///
    /// # Errors
    /// No such layer, weights that cannot be read, or, unless implemented, always.
    fn router(&self, layer: usize) -> Result<Vec<f32>> {
        Err(Error::NoRouter { layer })
    }
}

impl ExpertWeightsSource for Checkpoint {
    fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        Ok(Checkpoint::expert(self, layer, expert)?)
    }

    fn router(&self, layer: usize) -> Result<Vec<f32>> {
        let mut rows = self.read_f32(Role::Layer(layer, LayerRole::Router))?;
        if let Some(moe) = self.config().moe(layer) {
            // Those of identity experts come last.
            rows.truncate(moe.num_experts() * self.config().hidden_size);
        }
        Ok(rows)
    }
}

/// No weights: for scorers that read statistics only.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWeights;

impl ExpertWeightsSource for NoWeights {
    fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        Err(Error::NoWeights { layer, expert })
    }
}

/// Weights of an expert, checked to have `width` units.
pub(super) fn expert_of_width(
    weights: &dyn ExpertWeightsSource,
    layer: usize,
    expert: usize,
    width: usize,
) -> Result<ExpertWeights> {
    let weights = weights.expert(layer, expert)?;
    if weights.width != width {
        return Err(Error::WeightsMismatch { layer, expert, found: weights.width, expected: width });
    }
    Ok(weights)
}
