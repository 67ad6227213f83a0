//! How much every layer and expert keeps.
//!
//! An [`Allocator`] turns scores and a [`Budget`] into an [`Allocation`]. The same allocators distribute the units
//! inside experts and whole experts: [`Limits`] says what goes. The rules of "Selection scope" of Fisher-MoE (arXiv
//! 2606.05538 and its released code) compare raw scores over one pool: an expert ([`Uniform`]), a layer ([`PerLayer`])
//! or the model ([`Global`]). The others make layers comparable ([`Normalized`]), guarantee or prescribe them a share
//! ([`Hybrid`], [`DepthPrior`]), minimize a sum of distortion curves ([`RateDistortion`]) or ask the model ([`Rco`],
//! [`Evolution`]).

mod config;
mod coverage;
mod depth_prior;
mod evolution;
mod global;
mod hybrid;
mod layer;
mod normalized;
mod rate_distortion;
mod rco;
mod request;
mod uniform;

pub use moe_checkpoint::{Choice, knapsack};
use moe_checkpoint::{ExpertId, Granularity, Pool, ProtectionMask, ScoreTable};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use config::{AllocatorConfig, OwnAllocator};
pub use coverage::Coverage;
pub use depth_prior::{DepthPrior, Prior};
pub use evolution::{Evolution, Fitness};
pub use global::Global;
pub use hybrid::Hybrid;
pub use layer::PerLayer;
pub use normalized::{Normalization, Normalized};
pub use rate_distortion::{CurveSource, RateDistortion};
pub use rco::Rco;
pub use request::{AllocationRequest, ExpertLimits, Limits, WidthLimits};
pub use uniform::Uniform;

use crate::plan::LayerKept;
use crate::probe::{ModelProbe, NoProbe};
use crate::ranking::{Queue, Side};
use crate::{Budget, Error, Needs, Result};

/// Decides how much every expert keeps.
///
/// One of your own gives an [`Allocation`] by [`AllocationRequest::allocation`], and works in every pruner as
/// [`AllocatorConfig::own`].
pub trait Allocator {
    /// The allocator with its parameters, as a plan records it: an object whose `type` names it.
    fn recipe(&self) -> Value;

    /// What it needs to distribute units or whole experts.
    fn needs(&self, granularity: Granularity) -> Needs;

    /// Distributes the budget with a model at hand. Allocators that do not ask the model ignore it.
    ///
    /// # Errors
    /// Those of [`AllocationRequest::validate`] before any work; [`Error::Infeasible`] if floors need more than the
    /// budget leaves, never a silent clamp; [`Error::Inexact`] if exactness was asked for and the width multiple makes
    /// it impossible; those of the probe.
    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation>;

    /// Distributes the budget, from scores alone.
    ///
    /// # Errors
    /// As [`Allocator::allocate_with`]; [`Error::NeedsProbe`] for an allocator that has to run the model.
    fn allocate(&self, request: &AllocationRequest<'_>) -> Result<Allocation> {
        self.allocate_with(request, &mut NoProbe)
    }
}

/// What an allocator decided, and what it expects of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// Recipe of the allocator; see [`Allocator::recipe`].
    pub allocator: Value,
    /// The budget it worked on.
    pub budget: Budget,
    /// MoE layers in ascending order.
    pub layers: Vec<LayerAllocation>,
    /// Units that the budget alone would drop.
    pub asked_dropped: usize,
    /// Units that are dropped.
    pub dropped: usize,
    /// Predicted distortion: the sum of the dropped scores, or what the curves of the allocator say. None where the
    /// scores do not add up over the model ([`ScoreTable::adds_up`](moe_checkpoint::ScoreTable::adds_up)): ranks,
    /// shares, norms of outputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<f64>,
    /// Distortion of the model as allocated, where the allocator had a probe: next to [`Allocation::predicted`] of
    /// measured curves, how well distortions of layers add up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<f64>,
    /// Cost of what is kept, in parameters of routed experts.
    pub cost: u64,
    /// What was protected.
    pub protected: ProtectionMask,
    /// Experts that protection or a minimum kept from losing more.
    pub floor_hits: Vec<ExpertId>,
    /// Seed of allocators that draw random numbers.
    pub seed: Option<u64>,
    /// What else a user should know of it. The plan and the report repeat it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The part of one layer in an [`Allocation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerAllocation {
    /// Decoder layer index.
    pub layer: usize,
    /// Kept unit ids of every expert, ascending.
    pub kept: Vec<Vec<u32>>,
    /// Experts that go with their rows of the router, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<u32>,
    /// Predicted distortion of this layer; none where scores do not add up within it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<f64>,
}

impl LayerAllocation {
    /// Kept units of every expert.
    pub fn widths(&self) -> Vec<usize> {
        self.kept.iter().map(Vec::len).collect()
    }

    /// Kept units of the layer.
    pub fn units(&self) -> usize {
        self.kept.iter().map(Vec::len).sum()
    }

    /// Experts that keep units.
    pub fn experts(&self) -> usize {
        self.kept.iter().filter(|kept| !kept.is_empty()).count()
    }
}

/// The predictions of the layers together, if scores add up over the model.
pub(crate) fn sum_of_layers(scores: &ScoreTable, layers: &[LayerAllocation]) -> Option<f64> {
    match scores.adds_up(Pool::Global) {
        true => layers.iter().map(|layer| layer.predicted).sum(),
        false => None,
    }
}

impl Allocation {
    /// The allocation of given numbers of kept blocks `[MoE layer][queue]`: every queue keeps its best.
    pub(crate) fn of_blocks(
        allocator: Value,
        request: &AllocationRequest<'_>,
        queues: &[Vec<Queue>],
        blocks: &[Vec<usize>],
        asked_dropped: usize,
        floor_hits: Vec<ExpertId>,
    ) -> Result<Self> {
        let dropped_score = |(queues, blocks): (&Vec<Queue>, &Vec<usize>)| {
            queues.iter().zip(blocks).map(|(q, b)| q.dropped_score(*b)).sum()
        };
        let in_layers = request.scores.adds_up(Pool::Layer);
        let predicted: Vec<Option<f64>> =
            queues.iter().zip(blocks).map(|layer| in_layers.then(|| dropped_score(layer))).collect();
        let layers: Vec<LayerAllocation> = request
            .layers(queues, blocks)
            .into_iter()
            .zip(predicted)
            .map(|(LayerKept { layer, experts, removed }, predicted)| LayerAllocation {
                layer,
                kept: experts,
                removed,
                predicted,
            })
            .collect();
        let kept: usize = layers.iter().map(LayerAllocation::units).sum();
        let dropped = request.shape.units() - kept;
        if let Limits::Units(WidthLimits { exact: true, round_to, .. }) = request.limits
            && dropped != asked_dropped
        {
            return Err(Error::Inexact { asked: asked_dropped, achieved: dropped, round_to });
        }
        Ok(Self {
            allocator,
            budget: request.budget,
            predicted: sum_of_layers(request.scores, &layers),
            measured: None,
            layers,
            asked_dropped,
            dropped,
            cost: kept as u64 * request.shape.parameters_per_unit() as u64,
            protected: request.protect.clone(),
            floor_hits,
            seed: None,
            notes: exceeded(request, queues, dropped, asked_dropped).into_iter().collect(),
        })
    }

    /// What stays, as a plan has it.
    pub fn kept(&self) -> Vec<LayerKept> {
        let of =
            |l: &LayerAllocation| LayerKept { layer: l.layer, experts: l.kept.clone(), removed: l.removed.clone() };
        self.layers.iter().map(of).collect()
    }

    /// The number of experts with units, or `None` if layers differ in it.
    pub fn uniform_experts(&self) -> Option<usize> {
        let mut counts = self.layers.iter().map(LayerAllocation::experts);
        let first = counts.next()?;
        counts.all(|count| count == first).then_some(first)
    }
}

/// Says that a ratio is exceeded, and why.
fn exceeded(request: &AllocationRequest<'_>, queues: &[Vec<Queue>], dropped: usize, asked: usize) -> Option<String> {
    let remainder: usize = queues.iter().flatten().map(Queue::remainder).sum();
    if request.budget.side() == Side::AtMost || dropped <= asked || remainder == 0 {
        return None;
    }
    let what = match request.limits {
        Limits::Units(limits) => format!("widths are multiples of {}", limits.round_to),
        Limits::Experts(limits) => format!("numbers of experts are multiples of {}", limits.multiple()),
    };
    Some(format!(
        "{dropped} units go where the ratio asks for {asked} at most: {what}, and the remainder, {remainder} units, always \
         goes"
    ))
}

/// Rounds a number of kept units to a multiple: up for ratios, down for parameter budgets, never above `widest`.
pub(crate) fn round_kept(budget: Budget, kept: usize, round_to: usize, widest: usize) -> usize {
    let rounded = if budget.side() == Side::AtLeast { kept.next_multiple_of(round_to) } else { kept - kept % round_to };
    rounded.min(widest)
}

/// The largest number that divides the units of every block; 1 if there are none.
pub(crate) fn common_step<'a>(queues: impl Iterator<Item = &'a Queue>) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let of_queue = |queue: &Queue| match queue.expert {
        Some(_) => {
            if queue.blocks() > 0 {
                queue.block_units(0)
            } else {
                0
            }
        }
        None => (0..queue.blocks()).map(|block| queue.block_units(block)).fold(0, gcd),
    };
    queues.map(of_queue).fold(0, gcd).max(1)
}

/// Shares `total` out so that share `i` is near `quotas[i] / divisor` and at most `caps[i]`: whole parts first, then
/// one each by largest remainder (ties: lower index), again and again while there is something left that fits.
pub(crate) fn apportion(quotas: &[u128], divisor: u128, total: usize, caps: &[usize]) -> Vec<usize> {
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
