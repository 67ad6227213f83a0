//! All units of the model compete.

use moe_checkpoint::Pool;
use serde::{Deserialize, Serialize};

use super::{Allocation, AllocationRequest, Allocator, AllocatorConfig, round_kept};
use crate::Result;
use crate::ranking::{Ranking, rank, share};

/// Scope G of Fisher-MoE: the pool is every unit of every MoE layer, of which `floor(N * ratio)` go, lowest score first.
/// Widths differ between experts and layers and may become 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Global {}

impl Allocator for Global {
    fn allocate(&self, request: &AllocationRequest<'_>) -> Result<Allocation> {
        request.validate(Pool::Global)?;
        let AllocationRequest { shape, budget, limits, .. } = request;
        let rankings = rank(request)?;
        let pool: Vec<&Ranking<'_>> = rankings.iter().flatten().collect();
        let keep = budget.kept_units(shape);
        let asked = shape.units() - keep;
        let widest = pool.iter().map(|expert| expert.widest).sum();
        let keep = round_kept(*budget, keep, limits.round_to, widest);
        let (shares, hits) = share(&pool, keep, limits.round_to, || "the model".to_string())?;
        let mut shares = shares.into_iter();
        let widths: Vec<Vec<usize>> =
            rankings.iter().map(|experts| shares.by_ref().take(experts.len()).collect()).collect();
        Allocation::of_widths(AllocatorConfig::Global(*self), request, &rankings, &widths, asked, hits)
    }
}
