//! Structural export with one width for all experts: what stock loaders read.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Checkpoint, ExpertLayout, Ffn, UniformShape, ragged_config, uniform_shape_config};

use super::attention;
use super::shared_sets::shared_config;
use super::target::{Target, TargetLayer};
use super::{PruneForm, PruneOptions};
use crate::{PrunePlan, Result};

/// Width multiple that the grouped matrix products of stock loaders need: 16 bytes of a 16-bit type.
pub(super) const ALIGNMENT: usize = 8;

/// The target of a form whose widths all agree. The layout that was read is kept; a ragged checkpoint gets the stock
/// layout of its family. Where a config says how many times the width of a routed expert the shared experts have,
/// that number follows the width, and the shared experts grow by units of zeros if it has to be rounded up.
///
/// Numbers of experts may differ by layer where `by_layer` says that the quantization that is kept has a place for
/// them: the config is then that of a ragged model, and becomes a stock one with its quantization.
pub(super) fn target(
    plan: &PrunePlan,
    from: &Checkpoint,
    options: &PruneOptions<'_>,
    by_layer: bool,
) -> Result<Target> {
    let refuse = |reason: String| Err(PruneForm::Uniform.refused(reason));
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
    check_width(width, from, options)?;
    check_shared(width, from, options)?;
    let experts = shape.layers[0].num_experts();
    // Where experts share, the config says how many there are in every layer.
    let other = shape.layers.iter().find(|layer| layer.num_experts() != experts && !from.grouped());
    if let Some(other) = other {
        if by_layer && from.shape().uniform_width() == Some(width) && !from.family().attention_has_experts() {
            return counts_by_layer(plan, from);
        }
        return refuse(format!(
            "stock loaders read one number of experts for all layers, but layer {first_layer} keeps {experts} and layer {} \
             keeps {}; export as ragged, or prune whole experts of a model that compressed-tensors has quantized",
            other.layer,
            other.num_experts()
        ));
    }
    let layers = plan.kept.iter().map(|kept| Ok(TargetLayer::kept(from, kept, stock_layout(from, kept.layer, width)?)));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let removed = plan.kept.iter().any(|layer| !layer.removed.is_empty());
    let (shared_experts, shared_width) = shared(from, width);
    let experts = (!from.grouped() && (removed || from.ragged())).then_some(experts);
    let top_k = plan.top_k_clamp().map(|clamp| clamp.after);
    let attention = match experts {
        Some(count) if from.family().attention_has_experts() => attention::kept(from, count)?,
        _ => BTreeMap::new(),
    };
    let shape =
        UniformShape { width, experts, top_k, shared_experts, attention_follows: true, ..UniformShape::default() };
    let config = shared_config(from, &layers, |config| Ok(uniform_shape_config(config, shape)?))?;
    let notes = attention.values().next().map(|kept| {
        format!(
            "attention keeps {} experts in every layer, too, those with the largest weights, since a config of `{}` has \
             one number of experts for both halves",
            kept.len(),
            from.config().model_type
        )
    });
    let notes = notes.into_iter().collect();
    Ok(Target { shared_width, attention, notes, ..Target::new(config, layers) })
}

/// Whole experts go, more from some layers than from others.
fn counts_by_layer(plan: &PrunePlan, from: &Checkpoint) -> Result<Target> {
    let layer = |kept: &crate::plan::LayerKept| Ok(TargetLayer::kept(from, kept, from.expert_layout(kept.layer)?));
    let layers = plan.kept.iter().map(layer).collect::<Result<Vec<_>>>()?;
    let widths = layers.iter().map(|layer| (layer.layer, layer.widths())).collect();
    let config = shared_config(from, &layers, |config| Ok(ragged_config(config, &widths, &BTreeSet::new())?))?;
    Ok(Target::new(config, layers))
}

/// Refuses a width that stock loaders fail on, unless it is wanted.
fn check_width(width: usize, from: &Checkpoint, options: &PruneOptions<'_>) -> Result<()> {
    if aligned(width, from) {
        return Ok(());
    }
    let reason = format!(
        "width {width} is not a multiple of {ALIGNMENT}, which the grouped matrix products of stock loaders need in 16-bit \
         types"
    );
    if options.allow_unaligned {
        tracing::warn!("{reason}");
        return Ok(());
    }
    let reason = format!("{reason}; prune with round_to {ALIGNMENT}, or allow unaligned widths");
    Err(options.form.refused(reason))
}

/// Refuses another width where the shared expert would have to have it, too.
pub(super) fn check_shared(width: usize, from: &Checkpoint, options: &PruneOptions<'_>) -> Result<()> {
    if !from.family().shared_follows_width() || from.shape().uniform_width() == Some(width) {
        return Ok(());
    }
    Err(options.form.refused(format!(
        "experts of width {width}: a config of `{}` has one width, `{}`, for routed and shared experts, and the shared ones are not \
         pruned; remove whole experts, or export as ragged or masked",
        from.config().model_type,
        from.family().width_key()
    )))
}

/// Whether stock loaders can run a width. One that the checkpoint has already is its own affair.
pub(super) fn aligned(width: usize, from: &Checkpoint) -> bool {
    width.is_multiple_of(ALIGNMENT) || from.shape().uniform_width() == Some(width)
}

/// The layout of a layer in a checkpoint of one width. Where files may have experts transposed or not, loaders tell by
/// shape and take a square tensor for one that is not: such a width is written so.
pub(super) fn stock_layout(from: &Checkpoint, layer: usize, width: usize) -> Result<ExpertLayout> {
    let layout = match from.expert_layout(layer)? {
        ExpertLayout::Ragged => from.family().stock_layout(),
        other => other,
    };
    let hidden = from.config().hidden_size;
    let square = 2 * width == hidden || width == hidden;
    let told_by_shape = from.family().layouts().contains(&ExpertLayout::Fused);
    let changes = from.shape().uniform_width() != Some(width);
    Ok(match layout {
        ExpertLayout::Transposed if square && told_by_shape && changes => ExpertLayout::Fused,
        other => other,
    })
}

/// The number of shared experts that a config must say, in families that count them in widths of a routed expert, and
/// their width together where it has to grow to a multiple of `width`.
pub(super) fn shared(from: &Checkpoint, width: usize) -> (Option<usize>, Option<usize>) {
    if from.family().shared_count_key().is_none() {
        return (None, None);
    }
    let shared = from.config().layers.iter().find_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => moe.shared.as_ref(),
        Ffn::Dense { .. } | Ffn::None => None,
    });
    let Some(shared) = shared else { return (None, None) };
    let count = shared.intermediate_size.div_ceil(width);
    let grown = count * width;
    (Some(count), (grown != shared.intermediate_size).then_some(grown))
}
