//! Every expert drops the same fraction of its units.

use moe_checkpoint::Pool;
use serde::{Deserialize, Serialize};

use super::{Allocation, AllocationRequest, Allocator, AllocatorConfig, round_kept};
use crate::Result;
use crate::ranking::{rank, share};

/// Scope E of Fisher-MoE: the pool is one expert, which drops `floor(I * ratio)` units, so that experts of one width
/// stay of one width and stock runtimes load the result.
///
/// A width multiple rounds the width up for a ratio (to the nearest multiple at or above `I - floor(I * ratio)`), down
/// for a parameter budget. Floors above that width are an error: one width for all leaves nothing to redistribute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uniform {}

impl Allocator for Uniform {
    fn allocate(&self, request: &AllocationRequest<'_>) -> Result<Allocation> {
        request.validate(Pool::Expert)?;
        let AllocationRequest { shape, budget, limits, .. } = request;
        let rankings = rank(request)?;
        let (units, kept_units) = (shape.units(), budget.kept_units(shape));
        let (mut widths, mut hits, mut asked) = (Vec::new(), Vec::new(), 0);
        for experts in &rankings {
            let mut layer = Vec::with_capacity(experts.len());
            for expert in experts {
                let width = expert.width();
                // A parameter budget is shared in proportion to width; u128 since the product may not fit.
                let proportional = || (width as u128 * kept_units as u128 / units.max(1) as u128) as usize;
                let keep = budget.kept_of_pool(width).unwrap_or_else(proportional);
                asked += width - keep;
                let keep = round_kept(*budget, keep, limits.round_to, expert.widest);
                let (shares, floored) = share(&[expert], keep, limits.round_to, || expert.id.to_string())?;
                layer.extend(shares);
                hits.extend(floored);
            }
            widths.push(layer);
        }
        Allocation::of_widths(AllocatorConfig::Uniform(*self), request, &rankings, &widths, asked, hits)
    }
}
