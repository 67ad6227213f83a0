//! Export with unchanged shapes and zeroed units, and the way back from zeros to a plan.

use std::collections::BTreeSet;

use moe_checkpoint::{Checkpoint, Dtype, ExpertLayout, Ratio, RawMatrix};
use serde_json::json;

use super::{Export, Target, TargetLayer};
use crate::plan::{LayerKept, PrunePlan};
use crate::{Error, Result};

/// The target of a masked export: everything as it was, gate rows, up rows and down columns of dropped units zeroed.
pub(crate) fn target<'a>(plan: &'a PrunePlan, from: &Checkpoint) -> Result<Target<'a>> {
    if let Some(layer) = plan.kept.iter().find(|layer| !layer.removed.is_empty()) {
        let reason = format!(
            "layer {} loses whole experts, which zeros cannot do: the router would still choose them; export as uniform \
             or ragged",
            layer.layer
        );
        return Err(Error::Export { mode: Export::Masked.name(), reason });
    }
    let layers = plan.kept.iter().zip(&plan.shape.layers).map(|(kept, before)| {
        let layout = match from.expert_layout(kept.layer)? {
            ExpertLayout::Mxfp4 => from.family().stock_layout(),
            other => other,
        };
        let mut layer = TargetLayer { zero: true, ..TargetLayer::kept(from, kept, layout) };
        layer.experts.iter_mut().zip(&before.widths).for_each(|(expert, width)| expert.width = *width);
        Ok(layer)
    });
    let layers = layers.collect::<Result<_>>()?;
    Ok(Target { config: from.raw_config().clone(), layers, shared_width: None, dropped: BTreeSet::new() })
}

/// The plan that a masked checkpoint carries out: a unit counts as dropped when its whole gate row is zero. The plan is
/// one of that checkpoint, so that applying it structurally gives the small model.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) for experts that cannot be read.
pub fn plan_from_masked(checkpoint: &Checkpoint) -> Result<PrunePlan> {
    let mut plan = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
    for LayerKept { layer, experts, .. } in &mut plan.kept {
        for (expert, kept) in experts.iter_mut().enumerate() {
            let gate = checkpoint.expert_bytes(*layer, expert)?.gate;
            kept.retain(|unit| !gate.row(*unit as usize).is_some_and(|row| is_zero(&gate, row)));
            checkpoint.release_expert(*layer, expert)?;
        }
    }
    let units = plan.shape.units();
    let dropped = (units - plan.units_kept()) as f64 / units.max(1) as f64;
    plan.ratio = Ratio { asked: dropped, achieved: dropped };
    plan.recipe = json!({ "pruner": { "type": "from_masked" } });
    Ok(plan)
}

/// Whether all elements are 0.0 or -0.0: no bit but the sign.
fn is_zero(matrix: &RawMatrix<'_>, row: &[u8]) -> bool {
    match matrix.dtype {
        Dtype::F32 => row.as_chunks().0.iter().all(|bytes| u32::from_le_bytes(*bytes) << 1 == 0),
        Dtype::F16 | Dtype::BF16 => row.as_chunks().0.iter().all(|bytes| u16::from_le_bytes(*bytes) << 1 == 0),
        _ => row.iter().all(|byte| *byte == 0),
    }
}
