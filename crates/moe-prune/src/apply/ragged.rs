//! Structural export with a width per expert, in the documented format of this project.

use std::collections::BTreeSet;

use moe_checkpoint::{Checkpoint, ExpertBiases, ExpertLayout, ragged_config};

use super::{Target, TargetLayer};
use crate::{EditSource, PrunePlan, Result};

/// The target of a ragged export: two tensors per MoE layer, widths in the config, a `model_type` that stock loaders
/// refuse instead of loading random experts. Width 0 is legal. A layer with an expert whose bias is edited gets a tensor of
/// biases, zero for the others.
pub(crate) fn target<'a>(plan: &'a PrunePlan, from: &Checkpoint, edits: Option<&dyn EditSource>) -> Result<Target<'a>> {
    let mut layers = Vec::with_capacity(plan.kept.len());
    for kept in &plan.kept {
        let mut layer = TargetLayer::kept(from, kept, ExpertLayout::Ragged);
        if let Some(edits) = edits.filter(|_| layer.biases == ExpertBiases::None) {
            for expert in kept.experts_kept() {
                if edits.sizes(kept.layer, expert)?.down_bias.is_some() {
                    layer.biases = ExpertBiases::Down;
                }
            }
        }
        layers.push(layer);
    }
    let widths = layers.iter().map(|layer| (layer.layer, layer.widths())).collect();
    let biased = layers.iter().filter(|layer| layer.biases == ExpertBiases::Down).map(|layer| layer.layer).collect();
    let config = ragged_config(from.raw_config(), &widths, &biased)?;
    Ok(Target { config, layers, shared_width: None, dropped: BTreeSet::new() })
}
