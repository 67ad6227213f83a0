//! Structural export with one width for all experts: what stock loaders read.

use moe_checkpoint::{Checkpoint, ExpertLayout, uniform_config};

use super::{ApplyOptions, Export, Target, TargetLayer};
use crate::{Error, PrunePlan, Result};

/// Width multiple that the grouped matrix products of stock loaders need: 16 bytes of a 16-bit type.
const ALIGNMENT: usize = 8;

/// The target of an export whose widths all agree. The layout that was read is kept; a ragged checkpoint becomes one with
/// three tensors per expert.
pub(crate) fn target(plan: &PrunePlan, from: &Checkpoint, options: &ApplyOptions<'_>) -> Result<Target> {
    let refuse = |reason: String| Err(Error::Export { mode: Export::Uniform.name(), reason });
    let shape = plan.pruned_shape();
    let mut widths = shape.layers.iter().flat_map(|l| l.widths.iter().enumerate().map(|(e, w)| (l.layer, e, *w)));
    let Some((first_layer, first_expert, width)) = widths.next() else {
        return refuse("the model has no MoE layer".into());
    };
    if let Some((layer, expert, other)) = widths.find(|(_, _, other)| *other != width) {
        return refuse(format!(
            "stock loaders read one width for all experts, but expert {first_expert} of layer {first_layer} has {width} \
             units and expert {expert} of layer {layer} has {other}; use scope `expert`, or export as ragged or masked"
        ));
    }
    if width == 0 {
        return refuse("no expert would keep any unit".into());
    }
    // A width that the checkpoint has already is its own affair.
    let unchanged = from.shape().uniform_width() == Some(width);
    if !width.is_multiple_of(ALIGNMENT) && !unchanged {
        let reason = format!(
            "width {width} is not a multiple of {ALIGNMENT}, which the grouped matrix products of stock loaders need in \
             16-bit types"
        );
        if !options.allow_unaligned {
            return refuse(format!("{reason}; prune with round_to {ALIGNMENT}, or allow unaligned widths"));
        }
        tracing::warn!("{reason}");
    }
    let layers = shape.layers.into_iter().map(|layer| {
        let layout = match from.expert_layout(layer.layer)? {
            ExpertLayout::Ragged => ExpertLayout::PerExpert,
            other => other,
        };
        Ok(TargetLayer { layer: layer.layer, layout, widths: layer.widths, zero: false })
    });
    Ok(Target { config: uniform_config(from.raw_config(), width)?, layers: layers.collect::<Result<_>>()? })
}
