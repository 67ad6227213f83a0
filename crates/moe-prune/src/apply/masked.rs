//! Export with unchanged shapes and zeroed units, and the way back from zeros to a plan.

use moe_checkpoint::{Checkpoint, Dtype, RawMatrix};
use serde_json::json;

use super::{Target, TargetLayer};
use crate::Result;
use crate::plan::{LayerKept, PrunePlan, Ratio};

/// The target of a masked export: everything as it was, gate rows, up rows and down columns of dropped units zeroed.
pub(crate) fn target(plan: &PrunePlan, from: &Checkpoint) -> Result<Target> {
    let layers = plan.shape.layers.iter().map(|layer| {
        let layout = from.expert_layout(layer.layer)?;
        Ok(TargetLayer { layer: layer.layer, layout, widths: layer.widths.clone(), zero: true })
    });
    Ok(Target { config: from.raw_config().clone(), layers: layers.collect::<Result<_>>()? })
}

/// The plan that a masked checkpoint carries out: a unit counts as dropped when its whole gate row is zero. The plan is
/// one of that checkpoint, so that applying it structurally gives the small model.
///
/// # Errors
/// [`Error::Checkpoint`](crate::Error::Checkpoint) for experts that cannot be read.
pub fn plan_from_masked(checkpoint: &Checkpoint) -> Result<PrunePlan> {
    let mut plan = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
    for LayerKept { layer, experts } in &mut plan.kept {
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
