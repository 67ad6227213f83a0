//! Structural export with a width per expert, in the documented format of this project.

use std::collections::BTreeSet;

use moe_checkpoint::{Checkpoint, ExpertLayout, ragged_config};

use super::{Target, TargetLayer};
use crate::{PrunePlan, Result};

/// The target of a ragged export: two tensors per MoE layer, widths in the config, a `model_type` that stock loaders
/// refuse instead of loading random experts. Width 0 is legal.
pub(crate) fn target(plan: &PrunePlan, from: &Checkpoint) -> Result<Target> {
    let pruned = plan.pruned_shape().layers.into_iter();
    let layers: Vec<TargetLayer> = pruned
        .zip(&plan.kept)
        .map(|(layer, kept)| TargetLayer {
            layer: layer.layer,
            layout: ExpertLayout::Ragged,
            widths: layer.widths,
            experts: kept.experts_kept(),
            zero: false,
        })
        .collect();
    let widths = layers.iter().map(|layer| (layer.layer, layer.widths.clone())).collect();
    let config = ragged_config(from.raw_config(), &widths)?;
    Ok(Target { config, layers, shared_width: None, dropped: BTreeSet::new() })
}
