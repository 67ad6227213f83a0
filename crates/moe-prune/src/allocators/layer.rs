//! Every layer drops the same fraction of its units; the experts of a layer compete.

use moe_checkpoint::{Granularity, Pool};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, apportion, common_step, round_kept};
use crate::probe::ModelProbe;
use crate::ranking::{Measure, Queue, queues, share};
use crate::recipe::tagged;
use crate::{Needs, Result};

/// Scope L of Fisher-MoE: the pool is one layer, which drops `floor(N_l * ratio)` of its `N_l` units. Widths differ
/// between experts and may become 0.
///
/// A parameter budget is shared over layers in proportion to their units, by largest remainders. With a width multiple,
/// and for whole experts, the total is rounded once and shared out in blocks the same way, so that the rounding of
/// single layers does not add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerLayer {}

impl Allocator for PerLayer {
    fn recipe(&self) -> Value {
        tagged("layer", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        Needs::new(granularity, Pool::Layer)
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        request.validate(&self.needs(request.granularity()), probe)?;
        let queues = queues(request)?;
        let AllocationRequest { shape, budget, .. } = request;
        let sizes: Vec<usize> = shape.layers.iter().map(|layer| layer.units()).collect();
        let per_layer: Option<Vec<usize>> = sizes.iter().map(|units| budget.kept_of_pool(*units)).collect();
        let keep = per_layer.unwrap_or_else(|| {
            let (units, kept) = (shape.units().max(1) as u128, budget.kept_units(shape));
            let quotas: Vec<_> = sizes.iter().map(|size| *size as u128 * kept as u128).collect();
            apportion(&quotas, units, kept, &sizes)
        });
        let asked = shape.units() - keep.iter().sum::<usize>();
        let widest: Vec<usize> =
            queues.iter().map(|queues| queues.iter().map(|queue| queue.kept_units(queue.blocks())).sum()).collect();
        let step = common_step(queues.iter().flatten());
        let total = round_kept(*budget, keep.iter().sum(), step, widest.iter().sum());
        let caps: Vec<usize> = widest.iter().map(|units| units / step).collect();
        let quotas: Vec<u128> = keep.iter().map(|units| *units as u128).collect();
        let steps = apportion(&quotas, step as u128, total / step, &caps);
        let (mut blocks, mut hits) = (Vec::new(), Vec::new());
        for ((queues, steps), layer) in queues.iter().zip(steps).zip(&shape.layers) {
            let pool: Vec<&Queue> = queues.iter().collect();
            let (shares, floored) =
                share(&pool, steps * step, budget.side(), Measure::Units, || format!("layer {}", layer.layer))?;
            blocks.push(shares);
            hits.extend(floored);
        }
        Allocation::of_blocks(self.recipe(), request, &queues, &blocks, asked, hits)
    }
}
