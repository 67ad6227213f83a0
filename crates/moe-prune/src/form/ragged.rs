//! Structural form with a width per expert, in the documented format of this project.

use moe_checkpoint::{Checkpoint, ExpertBiases, ExpertLayout, ragged_config};

use super::shared_sets::shared_config;
use super::target::{Target, TargetLayer};
use crate::{EditSource, PrunePlan, Result};

/// The target of a ragged form: two tensors per MoE layer, widths in the config, a `model_type` that stock loaders
/// refuse instead of loading random experts. Width 0 is legal. A layer with an expert whose bias is edited gets a
/// tensor of biases, zero for the others.
pub(super) fn target(plan: &PrunePlan, from: &Checkpoint, edits: Option<&dyn EditSource>) -> Result<Target> {
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
    let config = shared_config(from, &layers, |config| Ok(ragged_config(config, &widths, &biased)?))?;
    Ok(Target::new(config, layers))
}
