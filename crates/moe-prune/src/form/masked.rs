//! The form with unchanged shapes and zeroed units, and the way back from zeros to a plan.

use moe_checkpoint::{Checkpoint, Dtype, Ratio, RawMatrix};
use serde_json::json;

use super::PruneForm;
use super::target::{Target, TargetLayer};
use crate::Result;
use crate::plan::{LayerKept, PrunePlan};

/// The target of a masked form: everything as it was, gate rows, up rows and down columns of dropped units zeroed.
pub(super) fn target(plan: &PrunePlan, from: &Checkpoint) -> Result<Target> {
    if let Some(layer) = plan.kept.iter().find(|layer| !layer.removed.is_empty()) {
        let reason = format!(
            "layer {} loses whole experts, which zeros cannot do: the router would still choose them; export as uniform \
             or ragged",
            layer.layer
        );
        return Err(PruneForm::Masked.refused(reason));
    }
    let layers = plan.kept.iter().zip(&plan.shape.layers).map(|(kept, before)| {
        let layer = TargetLayer::kept(from, kept, from.expert_layout(kept.layer)?);
        let mut layer = TargetLayer { zero: true, ..layer };
        layer.sets.iter_mut().for_each(|set| set.width = before.widths[set.expert]);
        Ok(layer)
    });
    Ok(Target::new(from.raw_config().clone(), layers.collect::<Result<_>>()?))
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
