//! Every layer drops the same fraction of its units; the experts of a layer compete.

use moe_checkpoint::Pool;
use serde::{Deserialize, Serialize};

use super::{Allocation, AllocationRequest, Allocator, AllocatorConfig, round_kept};
use crate::Result;
use crate::ranking::{Ranking, rank, share};

/// Scope L of Fisher-MoE: the pool is one layer, which drops `floor(N_l * ratio)` of its `N_l` units. Widths differ
/// between experts and may become 0.
///
/// A parameter budget is shared over layers in proportion to their units, by largest remainders. With a width multiple,
/// the total is rounded once and shared out in blocks the same way, so that the rounding of single layers does not add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PerLayer {}

impl Allocator for PerLayer {
    fn allocate(&self, request: &AllocationRequest<'_>) -> Result<Allocation> {
        request.validate(Pool::Layer)?;
        let AllocationRequest { shape, budget, limits, .. } = request;
        let rankings = rank(request)?;
        let sizes: Vec<usize> = shape.layers.iter().map(|layer| layer.units()).collect();
        let per_layer: Option<Vec<usize>> = sizes.iter().map(|units| budget.kept_of_pool(*units)).collect();
        let keep = per_layer.unwrap_or_else(|| {
            let (units, kept) = (shape.units().max(1) as u128, budget.kept_units(shape));
            let quotas: Vec<_> = sizes.iter().map(|size| *size as u128 * kept as u128).collect();
            apportion(&quotas, units, kept, &sizes)
        });
        let asked = shape.units() - keep.iter().sum::<usize>();
        let widest: Vec<usize> =
            rankings.iter().map(|experts| experts.iter().map(|expert| expert.widest).sum()).collect();
        let total = round_kept(*budget, keep.iter().sum(), limits.round_to, widest.iter().sum());
        let caps: Vec<usize> = widest.iter().map(|units| units / limits.round_to).collect();
        let quotas: Vec<u128> = keep.iter().map(|units| *units as u128).collect();
        let blocks = apportion(&quotas, limits.round_to as u128, total / limits.round_to, &caps);
        let (mut widths, mut hits) = (Vec::new(), Vec::new());
        for ((experts, blocks), layer) in rankings.iter().zip(blocks).zip(&shape.layers) {
            let pool: Vec<&Ranking<'_>> = experts.iter().collect();
            let keep = blocks * limits.round_to;
            let (shares, floored) = share(&pool, keep, limits.round_to, || format!("layer {}", layer.layer))?;
            widths.push(shares);
            hits.extend(floored);
        }
        Allocation::of_widths(AllocatorConfig::Layer(*self), request, &rankings, &widths, asked, hits)
    }
}

/// Shares `total` out so that share `i` is near `quotas[i] / divisor` and at most `caps[i]`: whole parts first, then one
/// each by largest remainder (ties: lower index), again and again while there is something left that fits.
fn apportion(quotas: &[u128], divisor: u128, total: usize, caps: &[usize]) -> Vec<usize> {
    let mut shares: Vec<usize> =
        quotas.iter().zip(caps).map(|(quota, cap)| ((quota / divisor) as usize).min(*cap)).collect();
    let mut left = total.saturating_sub(shares.iter().sum());
    let mut order: Vec<usize> = (0..quotas.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(quotas[*index] % divisor));
    while left > 0 {
        let before = left;
        for index in &order {
            if left > 0 && shares[*index] < caps[*index] {
                shares[*index] += 1;
                left -= 1;
            }
        }
        if left == before {
            break;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remainders_go_to_the_largest_then_the_lowest_index() {
        // 10/4, 7/4, 7/4: whole parts 2, 1, 1, remainders 2, 3, 3.
        assert_eq!(apportion(&[10, 7, 7], 4, 6, &[9, 9, 9]), [2, 2, 2]);
        assert_eq!(apportion(&[10, 7, 7], 4, 5, &[9, 9, 9]), [2, 2, 1]);
        assert_eq!(apportion(&[10, 7, 7], 4, 8, &[9, 1, 9]), [4, 1, 3]);
        assert_eq!(apportion(&[10, 7, 7], 4, 8, &[2, 1, 1]), [2, 1, 1]);
    }
}
