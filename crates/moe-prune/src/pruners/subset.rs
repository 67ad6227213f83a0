//! Searching for the experts whose removal changes the output of their layer least.

use std::collections::BTreeSet;

use moe_checkpoint::{Granularity, MoeLayerShape, Routing};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ExpertPruner, PruneRequest, Pruner};
use crate::allocators::{Allocator, AllocatorConfig, LayerAllocation, Uniform};
use crate::probe::ModelProbe;
use crate::recipe::tagged;
use crate::{Allocation, Error, Needs, Questions, Result};

/// NAEE (arXiv 2402.14800): of every layer, the subset of experts whose removal (logits at minus infinity, renormalized
/// as the model does) moves the layer's output least in Frobenius norm over the calibration batches. Needs a probe.
///
/// How many go is the allocator's decision, from scores; the source takes the same number in every layer. Up to
/// [`SubsetPruner::limit`] subsets are tried exhaustively; beyond that, the one of the lowest scores and random ones.
/// Equal errors go to the subset of the lowest experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetPruner {
    /// How many experts every layer loses.
    pub allocator: AllocatorConfig,
    /// Groups of neighboring experts that lose as many each.
    pub groups: usize,
    /// No layer keeps fewer experts.
    pub min_experts: usize,
    /// Every layer keeps a multiple of this many experts.
    pub multiple_of: usize,
    /// Subsets tried per layer, at most.
    pub limit: usize,
    /// Seed of random subsets.
    pub seed: u64,
    /// Layers see what earlier layers have lost; otherwise all see the full model.
    pub progressive: bool,
}

impl Default for SubsetPruner {
    /// The same number in every layer, 10,000 subsets, layer-wise.
    fn default() -> Self {
        let allocator = AllocatorConfig::Uniform(Uniform::default());
        Self { allocator, groups: 1, min_experts: 0, multiple_of: 1, limit: 10_000, seed: 0, progressive: false }
    }
}

impl SubsetPruner {
    /// Keeps what this routing needs; see [`ExpertLimits::for_routing`](crate::ExpertLimits::for_routing).
    pub fn for_routing(mut self, routing: &Routing) -> Self {
        let limits = crate::ExpertLimits::for_routing(routing);
        (self.groups, self.min_experts) = (limits.groups, limits.min_experts);
        self
    }

    /// Subsets of `removed` experts (as many from every group) to try, none of them protected; `lowest` is one of them.
    fn candidates(
        &self,
        request: &PruneRequest<'_>,
        position: usize,
        shape: &MoeLayerShape,
        lowest: &[u32],
    ) -> Vec<Vec<u32>> {
        let groups = choices(request, position, shape, self.groups, lowest.len());
        let count = groups.iter().try_fold(1usize, |count, group| {
            combinations(group.free.len(), group.picks).and_then(|n| count.checked_mul(n))
        });
        if count.is_some_and(|count| count <= self.limit.max(1)) {
            let mut all: Vec<Vec<u32>> = vec![Vec::new()];
            for GroupChoice { gone, free, picks } in &groups {
                let subsets = subsets(free, *picks);
                let extend = |found: &Vec<u32>| {
                    let more = subsets.iter().map(|subset| [found, gone, subset.as_slice()].concat());
                    more.collect::<Vec<_>>()
                };
                all = all.iter().flat_map(extend).collect();
            }
            all.iter_mut().for_each(|subset| subset.sort_unstable());
            all.sort_unstable();
            return all;
        }
        // A stream of its own for every layer: what one layer draws does not depend on the others.
        let mut random =
            ChaCha8Rng::seed_from_u64(self.seed ^ (shape.layer as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut found = BTreeSet::from([lowest.to_vec()]);
        // There are more subsets than the limit, so new ones turn up; the bound only guards against bad luck.
        for _ in 0..self.limit.saturating_mul(8) {
            if found.len() >= self.limit {
                break;
            }
            let mut subset = Vec::with_capacity(lowest.len());
            for GroupChoice { gone, free, picks } in &groups {
                let mut shuffled = free.clone();
                let (drawn, _) = shuffled.partial_shuffle(&mut random, *picks);
                subset.extend_from_slice(drawn);
                subset.extend_from_slice(gone);
            }
            subset.sort_unstable();
            found.insert(subset);
        }
        found.into_iter().collect()
    }
}

impl Pruner for SubsetPruner {
    fn recipe(&self) -> Value {
        tagged("subset", self)
    }

    fn needs(&self) -> Needs {
        self.allocator.needs(Granularity::Expert).asking(Questions { layer_errors: true, ..Questions::NONE })
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        if self.limit == 0 {
            return Err(Error::InvalidParameter { field: "limit", found: "0".into(), expected: "at least 1".into() });
        }
        let Self { groups, min_experts, multiple_of, .. } = *self;
        let counts = ExpertPruner { allocator: self.allocator.clone(), groups, min_experts, multiple_of };
        let limits = request.with_limits(counts.limits());
        let mut allocation = self.allocator.allocate_with(&limits, probe)?;
        let mut layers = Vec::with_capacity(allocation.layers.len());
        for (position, (found, shape)) in allocation.layers.iter().zip(&request.shape.layers).enumerate() {
            let candidates = self.candidates(request, position, shape, &found.removed);
            let errors = probe.layer_errors(shape.layer, &candidates)?;
            let mut best: Option<(f64, &Vec<u32>)> = None;
            for (error, subset) in errors.iter().zip(&candidates) {
                if best.is_none_or(|(least, _)| *error < least) {
                    best = Some((*error, subset));
                }
            }
            let Some((predicted, removed)) = best.filter(|(error, _)| error.is_finite()) else {
                let found = format!("no finite error for layer {}", shape.layer);
                let expected = "an error for every candidate".into();
                return Err(Error::InvalidParameter { field: "probe", found, expected });
            };
            if self.progressive {
                probe.settle(shape.layer, removed)?;
            }
            let kept = |(expert, width): (usize, &usize)| match removed.binary_search(&(expert as u32)) {
                Ok(_) => Vec::new(),
                Err(_) => (0..*width as u32).collect(),
            };
            layers.push(LayerAllocation {
                layer: shape.layer,
                kept: shape.widths.iter().enumerate().map(kept).collect(),
                removed: removed.clone(),
                predicted: Some(predicted),
            });
        }
        allocation.predicted = layers.iter().map(|layer| layer.predicted).sum();
        allocation.seed = Some(self.seed);
        Ok(allocation.with_layers(layers, request.shape))
    }
}

/// What may go of a group of neighboring experts.
pub(super) struct GroupChoice {
    /// Gone already: part of every subset.
    pub gone: Vec<u32>,
    /// Experts that may go, ascending.
    pub free: Vec<u32>,
    /// How many of them go.
    pub picks: usize,
}

/// What may go of every group of a layer that loses `removed` experts, as many of every group; none is protected.
pub(super) fn choices(
    request: &PruneRequest<'_>,
    position: usize,
    shape: &MoeLayerShape,
    groups: usize,
    removed: usize,
) -> Vec<GroupChoice> {
    let gone = |expert: u32| request.gone.is_some_and(|gone| gone[position].experts[expert as usize].is_empty());
    let free = |expert: &u32| {
        request.protect.count(shape.layer, *expert as usize, shape.widths[*expert as usize]) == 0 && !gone(*expert)
    };
    let size = shape.num_experts() / groups;
    let of_group = |group: usize| {
        let members = (group * size) as u32..((group + 1) * size) as u32;
        let gone: Vec<u32> = members.clone().filter(|expert| gone(*expert)).collect();
        GroupChoice { picks: (removed / groups).saturating_sub(gone.len()), free: members.filter(free).collect(), gone }
    };
    (0..groups).map(of_group).collect()
}

/// `n` over `k`, if it can be counted.
fn combinations(n: usize, k: usize) -> Option<usize> {
    (0..k.min(n.saturating_sub(k))).try_fold(1usize, |count, i| count.checked_mul(n - i).map(|count| count / (i + 1)))
}

/// All subsets of `k` of `items`, in lexicographic order.
fn subsets(items: &[u32], k: usize) -> Vec<Vec<u32>> {
    if k > items.len() {
        return Vec::new();
    }
    let mut places: Vec<usize> = (0..k).collect();
    let mut found = Vec::new();
    loop {
        found.push(places.iter().map(|place| items[*place]).collect());
        let Some(last) = (0..k).rev().find(|i| places[*i] < items.len() - k + i) else { return found };
        places[last] += 1;
        for next in last + 1..k {
            places[next] = places[next - 1] + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subset_once() {
        assert_eq!(subsets(&[1, 4, 7], 2), [[1, 4], [1, 7], [4, 7]]);
        assert_eq!(subsets(&[1, 4], 0), [Vec::<u32>::new()]);
        assert_eq!(subsets(&[], 1), Vec::<Vec<u32>>::new());
        for (n, k) in [(8, 4), (6, 1), (5, 5), (7, 0)] {
            let items: Vec<u32> = (0..n as u32).collect();
            let found = subsets(&items, k);
            assert_eq!(Some(found.len()), combinations(n, k));
            assert!(found.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(combinations(200, 100), None);
    }
}
