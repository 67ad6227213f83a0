//! A guaranteed share for every layer, the rest by global rank.

use moe_checkpoint::{Granularity, Pool};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, global};
use crate::probe::ModelProbe;
use crate::ranking::{Measure, Queue, Side, queues, share};
use crate::recipe::tagged;
use crate::{Error, Needs, Result};

/// Every layer first keeps its best units (or experts) up to a fraction of what it would keep if all layers dropped
/// alike; the rest of the budget goes to the best of the whole model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hybrid {
    /// The guaranteed fraction, in [0, 1]: 0 is [`Global`](super::Global), 1 nearly [`PerLayer`](super::PerLayer).
    #[serde(default = "half")]
    pub guaranteed: f64,
}

fn half() -> f64 {
    0.5
}

impl Default for Hybrid {
    /// Half of it.
    fn default() -> Self {
        Self { guaranteed: half() }
    }
}

impl Allocator for Hybrid {
    fn recipe(&self) -> Value {
        tagged("hybrid", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        Needs::new(granularity, Pool::Global)
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        if !(0.0..=1.0).contains(&self.guaranteed) {
            let found = self.guaranteed.to_string();
            return Err(Error::InvalidParameter { field: "guaranteed", found, expected: "a number in [0, 1]".into() });
        }
        request.validate(&self.needs(request.granularity()), probe)?;
        let mut queues = queues(request)?;
        let share_kept = request.budget.kept_units(request.shape) as f64 / request.shape.units().max(1) as f64;
        for (queues, shape) in queues.iter_mut().zip(&request.shape.layers) {
            let guaranteed = (self.guaranteed * share_kept * shape.units() as f64).floor() as usize;
            let pool: Vec<&Queue> = queues.iter().collect();
            let floors: usize = pool.iter().map(|queue| queue.kept_units(queue.floor)).sum();
            let (kept, _) = share(&pool, guaranteed.max(floors), Side::AtMost, Measure::Units, || {
                format!("layer {}", shape.layer)
            })?;
            for (queue, kept) in queues.iter_mut().zip(kept) {
                queue.floor = kept.max(queue.floor);
            }
        }
        global::allocate(self.recipe(), request, &queues)
    }
}
