//! All units of the model compete.

use moe_checkpoint::{ExpertId, Granularity, Pool};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, common_step, round_kept};
use crate::probe::ModelProbe;
use crate::ranking::{Measure, Queue, queues, share};
use crate::recipe::tagged;
use crate::{Needs, Result};

/// Scope G of Fisher-MoE: the pool is every unit (or every expert) of every MoE layer, of which `floor(N * ratio)` go,
/// lowest score first. Widths differ between experts and layers and may become 0; a layer keeps as many experts as the
/// router selects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Global {}

impl Allocator for Global {
    fn recipe(&self) -> Value {
        tagged("global", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        Needs::new(granularity, Pool::Global)
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        request.validate(&self.needs(request.granularity()), probe)?;
        allocate(self.recipe(), request, &queues(request)?)
    }
}

/// The allocation of queues whose scores may be compared over the model.
pub(super) fn allocate(allocator: Value, request: &AllocationRequest<'_>, queues: &[Vec<Queue>]) -> Result<Allocation> {
    let keep = request.budget.kept_units(request.shape);
    let (blocks, hits) = compete(request, queues)?;
    Allocation::of_blocks(allocator, request, queues, &blocks, request.shape.units() - keep, hits)
}

/// Blocks that every queue keeps, `[MoE layer][queue]`, and who hit a floor.
pub(super) fn compete(
    request: &AllocationRequest<'_>,
    queues: &[Vec<Queue>],
) -> Result<(Vec<Vec<usize>>, Vec<ExpertId>)> {
    let pool: Vec<&Queue> = queues.iter().flatten().collect();
    let widest = pool.iter().map(|queue| queue.kept_units(queue.blocks())).sum();
    let step = common_step(pool.iter().copied());
    let keep = round_kept(request.budget, request.budget.kept_units(request.shape), step, widest);
    let (shares, hits) = share(&pool, keep, request.budget.side(), Measure::Units, || "the model".to_string())?;
    let mut shares = shares.into_iter();
    Ok((queues.iter().map(|queues| shares.by_ref().take(queues.len()).collect()).collect(), hits))
}
