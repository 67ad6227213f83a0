//! The same fraction everywhere.

use moe_checkpoint::{Granularity, Pool};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, Limits, round_kept};
use crate::probe::ModelProbe;
use crate::ranking::{Measure, Queue, queues, share};
use crate::recipe::tagged;
use crate::{Needs, Result};

/// Scope E of Fisher-MoE: the pool is one expert, which drops `floor(I * ratio)` units, so that experts of one width
/// stay of one width and stock runtimes load the result. Of whole experts, every layer drops `floor(E * ratio)`.
///
/// A width multiple rounds the width up for a ratio (to the nearest multiple at or above `I - floor(I * ratio)`), down
/// for a parameter budget; groups round the number of experts likewise. Floors above that are an error: one width for
/// all leaves nothing to redistribute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uniform {}

impl Allocator for Uniform {
    fn recipe(&self) -> Value {
        tagged("uniform", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        Needs::new(granularity, Pool::Expert)
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        request.validate(&self.needs(request.granularity()), probe)?;
        let AllocationRequest { shape, budget, limits, .. } = request;
        let queues = queues(request)?;
        let (units, kept_units) = (shape.units(), budget.kept_units(shape));
        // A parameter budget is shared in proportion; u128 since the product may not fit.
        let proportional = |size: usize| (size as u128 * kept_units as u128 / units.max(1) as u128) as usize;
        let keep_of = |size: usize| budget.kept_of_pool(size).unwrap_or_else(|| proportional(size));
        let (mut blocks, mut hits, mut asked) = (Vec::new(), Vec::new(), 0);
        for (queues, shape) in queues.iter().zip(&shape.layers) {
            let mut layer = Vec::with_capacity(queues.len());
            for (queue, width) in queues.iter().zip(&shape.widths) {
                let pool: [&Queue; 1] = [queue];
                let (shares, floored) = match limits {
                    Limits::Units(limits) => {
                        let keep = keep_of(*width);
                        asked += width - keep;
                        let keep = round_kept(*budget, keep, limits.round_to, queue.kept_units(queue.blocks()));
                        let what = || format!("layer {}, expert {}", queue.layer, queue.expert.unwrap_or_default());
                        share(&pool, keep, budget.side(), Measure::Units, what)?
                    }
                    Limits::Experts(limits) => {
                        let keep = round_kept(*budget, keep_of(shape.num_experts()), limits.multiple(), usize::MAX);
                        share(&pool, keep / limits.multiple(), budget.side(), Measure::Blocks, || {
                            format!("layer {}", queue.layer)
                        })?
                    }
                };
                layer.extend(shares);
                hits.extend(floored);
            }
            blocks.push(layer);
        }
        if let Limits::Experts(_) = limits {
            asked = units - kept_units;
        }
        Allocation::of_blocks(self.recipe(), request, &queues, &blocks, asked, hits)
    }
}
