//! The order in which units or experts go, and how a pool shares a number of kept units.

use std::ops::Range;

use moe_checkpoint::{ExpertId, LayerScores, MoeLayerShape, ProtectionMask, collect_in_order};
use rayon::prelude::*;

use crate::allocators::{AllocationRequest, ExpertLimits, Limits, WidthLimits};
use crate::plan::LayerKept;
use crate::{Error, Result};

/// What may go, in the order in which it goes: the units of one expert, or the experts of one layer. Gone already
/// before unprotected before protected, lowest score first, lower index first. What stays is always a tail, in blocks
/// of as many items each.
#[derive(Clone)]
pub(crate) struct Queue {
    /// Decoder layer index.
    pub layer: usize,
    /// The expert whose units these are; `None` where the items are experts.
    pub expert: Option<usize>,
    /// Item ids.
    order: Vec<u32>,
    /// Scores by position in `order`; 0 for what is gone already. Ascending among the items that are not protected.
    values: Vec<f64>,
    /// Units of every item by position in `order`; `None` where an item is one unit.
    units: Option<Vec<usize>>,
    /// Items of a block.
    size: usize,
    /// Items that always go: what is gone already, and the remainder that fills no block.
    head: usize,
    /// Items at the front of `head` that an earlier round dropped.
    gone: usize,
    /// Blocks that stay: what protection and minimum sizes ask for.
    pub floor: usize,
    /// Experts that the router selects of a layer, where that is a minimum.
    selected: usize,
}

impl Queue {
    fn of_units(
        limits: WidthLimits,
        protect: &ProtectionMask,
        kept: Option<&[u32]>,
        id: ExpertId,
        scores: &[f32],
    ) -> Result<Self> {
        let ExpertId { layer, expert } = id;
        let (width, size) = (scores.len(), limits.round_to);
        let is_gone = |unit: u32| kept.is_some_and(|kept| kept.binary_search(&unit).is_err());
        let any_protected = protect.count(layer, expert, width) > 0;
        let is_protected = |unit: u32| any_protected && protect.is_protected(layer, expert, unit);
        let mut order: Vec<u32> = (0..width as u32).collect();
        // Stable, so that equal scores stay in index order. Scores are finite: the table was validated.
        order.sort_by(|a, b| {
            let score = |unit: u32| f64::from(scores[unit as usize]);
            (!is_gone(*a), is_protected(*a))
                .cmp(&(!is_gone(*b), is_protected(*b)))
                .then_with(|| compare(score(*a), score(*b)))
        });
        let gone = kept.map_or(0, |kept| width - kept.len());
        let protected = order[gone..].iter().filter(|unit| is_protected(**unit)).count();
        let blocks = (width - gone) / size;
        let floor = protected.max(limits.min_width.min(width - gone)).div_ceil(size);
        if floor > blocks {
            return Err(Error::Infeasible {
                what: id.to_string(),
                asked: blocks * size,
                reason: format!(
                    "{protected} of its {width} units are protected and the minimum width is {}; the width must be a multiple of {size}",
                    limits.min_width
                ),
            });
        }
        let value = |(position, unit): (usize, &u32)| match position < gone {
            true => 0.0,
            false => f64::from(scores[*unit as usize]),
        };
        let values = order.iter().enumerate().map(value).collect();
        let head = width - blocks * size;
        Ok(Self { layer, expert: Some(expert), order, values, units: None, size, head, gone, floor, selected: 0 })
    }

    fn of_experts(
        limits: ExpertLimits,
        selected: usize,
        protect: &ProtectionMask,
        gone: Option<&LayerKept>,
        shape: &MoeLayerShape,
        scores: &LayerScores,
    ) -> Result<Self> {
        let (layer, experts, groups) = (shape.layer, shape.num_experts(), limits.groups);
        let is_gone = |expert: u32| gone.is_some_and(|kept| kept.experts[expert as usize].is_empty());
        let is_protected = |expert: u32| protect.count(layer, expert as usize, shape.widths[expert as usize]) > 0;
        let members = experts / groups;
        let rank = |group: usize| {
            let mut order: Vec<u32> = ((group * members) as u32..((group + 1) * members) as u32).collect();
            order.sort_by(|a, b| {
                let score = |expert: u32| f64::from(scores.scores[expert as usize][0]);
                (!is_gone(*a), is_protected(*a))
                    .cmp(&(!is_gone(*b), is_protected(*b)))
                    .then_with(|| compare(score(*a), score(*b)))
            });
            order
        };
        let ranked: Vec<Vec<u32>> = (0..groups).map(rank).collect();
        // One expert of every group is a block: groups lose as many each.
        let order: Vec<u32> = (0..members).flat_map(|place| ranked.iter().map(move |group| group[place])).collect();
        let gone_in = |group: &Vec<u32>| group.iter().filter(|expert| is_gone(**expert)).count();
        let lost = ranked.iter().map(gone_in).max().unwrap_or(0);
        let protected_in =
            |group: &Vec<u32>| group.iter().filter(|expert| is_protected(**expert) && !is_gone(**expert)).count();
        let protected = ranked.iter().map(protected_in).max().unwrap_or(0);
        let selected = if limits.keeps_router { 0 } else { selected };
        // A block takes as many of every group, so that what stays is a multiple.
        let per_group = limits.multiple() / groups;
        let blocks = (members - lost) / per_group;
        let floor = protected.max(limits.min_experts.max(selected).div_ceil(groups)).div_ceil(per_group);
        if floor > blocks {
            let units = |expert: &u32| shape.widths[*expert as usize];
            let multiple = match per_group {
                1 => String::new(),
                _ => format!("; their number must be a multiple of {}", per_group * groups),
            };
            return Err(Error::Infeasible {
                what: format!("layer {layer}"),
                asked: order[lost * groups..].iter().map(units).sum(),
                reason: format!(
                    "{} of its {experts} experts have to stay: {protected} of a group are protected, the minimum is {} and \
                     the router selects {selected}{multiple}",
                    floor * per_group * groups,
                    limits.min_experts
                ),
            });
        }
        let value = |expert: &u32| if is_gone(*expert) { 0.0 } else { f64::from(scores.scores[*expert as usize][0]) };
        let size = per_group * groups;
        let head = experts - blocks * size;
        Ok(Self {
            layer,
            expert: None,
            values: order.iter().map(value).collect(),
            units: Some(order.iter().map(|expert| shape.widths[*expert as usize]).collect()),
            order,
            size,
            head,
            gone: lost * groups,
            floor,
            selected,
        })
    }

    /// Units that go whatever the budget, since what is left of a width or of a number of experts fills no block. What
    /// an earlier round dropped does not count.
    pub fn remainder(&self) -> usize {
        match &self.units {
            None => self.head - self.gone,
            Some(units) => units[self.gone..self.head].iter().sum(),
        }
    }

    /// Blocks there are.
    pub fn blocks(&self) -> usize {
        (self.order.len() - self.head) / self.size
    }

    fn block(&self, index: usize) -> Range<usize> {
        let start = self.head + index * self.size;
        start..start + self.size
    }

    /// Sum of the scores of a block; the block of index 0 goes first.
    pub fn block_score(&self, index: usize) -> f64 {
        self.values[self.block(index)].iter().sum()
    }

    /// Units of a block.
    pub fn block_units(&self, index: usize) -> usize {
        match &self.units {
            None => self.size,
            Some(units) => units[self.block(index)].iter().sum(),
        }
    }

    /// Units that stay when `blocks` blocks do.
    pub fn kept_units(&self, blocks: usize) -> usize {
        let tail = self.order.len() - blocks * self.size..;
        match &self.units {
            None => blocks * self.size,
            Some(units) => units[tail].iter().sum(),
        }
    }

    /// Ids of the items that stay when `blocks` blocks do, ascending.
    pub fn kept(&self, blocks: usize) -> Vec<u32> {
        let mut kept = self.order[self.order.len() - blocks * self.size..].to_vec();
        kept.sort_unstable();
        kept
    }

    /// Sum of the scores that go when `blocks` blocks stay, in the order in which they go.
    pub fn dropped_score(&self, blocks: usize) -> f64 {
        self.values[..self.order.len() - blocks * self.size].iter().sum()
    }

    /// Scores of everything that is not gone already, in the order in which it goes.
    pub fn values_mut(&mut self) -> &mut [f64] {
        &mut self.values[self.gone..]
    }

    /// The experts that a block belongs to.
    fn owners(&self, index: usize) -> impl Iterator<Item = ExpertId> {
        let experts = match self.expert {
            Some(expert) => vec![expert],
            None => self.order[self.block(index)].iter().map(|expert| *expert as usize).collect(),
        };
        let layer = self.layer;
        experts.into_iter().map(move |expert| ExpertId { layer, expert })
    }
}

/// The queues of every MoE layer: one per expert for units, one per layer for experts.
pub(crate) fn queues(request: &AllocationRequest<'_>) -> Result<Vec<Vec<Queue>>> {
    let layers = request.scores.layers.iter().zip(&request.shape.layers).enumerate();
    let of_layer = |(position, (scores, shape)): (usize, (&LayerScores, &MoeLayerShape))| -> Result<Vec<Queue>> {
        let gone = request.gone.map(|kept| &kept[position]);
        match request.limits {
            Limits::Units(limits) => {
                let experts = scores.scores.par_iter().enumerate();
                let of_expert = |(expert, values): (usize, &Vec<f32>)| {
                    let kept = gone.map(|kept| kept.experts[expert].as_slice());
                    let id = ExpertId { layer: shape.layer, expert };
                    Queue::of_units(limits, request.protect, kept, id, values)
                };
                collect_in_order(experts.map(of_expert))
            }
            Limits::Experts(limits) => {
                let selected = request.selected(shape, limits);
                Ok(vec![Queue::of_experts(limits, selected, request.protect, gone, shape, scores)?])
            }
        }
    };
    layers.map(of_layer).collect()
}

/// On which side of a number of kept units a share ends where blocks do not meet it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Side {
    /// No more are kept: a bound on what stays.
    AtMost,
    /// No fewer are kept: a bound on what goes.
    AtLeast,
}

/// What a share is counted in.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Measure {
    Units,
    Blocks,
}

/// Blocks that every queue of a pool keeps when they keep `keep` units (or blocks) together, dropping the blocks of the
/// lowest score first (ties: earlier queue, then the block that goes first). Also the experts that would have lost more
/// if their floor allowed it.
///
/// Where blocks of different size do not meet `keep`, as little more ([`Side::AtMost`]) or less ([`Side::AtLeast`])
/// goes as the order allows: a block that is too large for what is left to drop stays, with what follows it in its
/// queue.
///
/// The scores of the blocks of a queue ascend, so the greedy choice is the one with the highest kept sum where blocks
/// are of one size. With blocks of one unit it is the plain stable ascending sort.
///
/// # Errors
/// [`Error::Infeasible`], with `what` as the pool, if the floors need more than `keep`.
pub(crate) fn share(
    pool: &[&Queue],
    keep: usize,
    side: Side,
    measure: Measure,
    what: impl Fn() -> String,
) -> Result<(Vec<usize>, Vec<ExpertId>)> {
    let measured = |queue: &Queue, blocks: usize| match measure {
        Measure::Units => queue.kept_units(blocks),
        Measure::Blocks => blocks,
    };
    let floors: usize = pool.iter().map(|queue| measured(queue, queue.floor)).sum();
    if floors > keep {
        let units = |blocks: &dyn Fn(&Queue) -> usize| pool.iter().map(|queue| queue.kept_units(blocks(queue))).sum();
        let needed: usize = units(&|queue| queue.floor);
        let asked = match measure {
            Measure::Units => keep,
            Measure::Blocks => units(&|queue| keep.min(queue.blocks())),
        };
        let reason = match pool.first().is_some_and(|queue| queue.expert.is_none()) {
            true => format!(
                "protected experts and minimum numbers need {needed}; the router selects {} experts",
                pool.iter().map(|queue| queue.selected).max().unwrap_or(0)
            ),
            false => format!("protected units and minimum widths need {needed}"),
        };
        return Err(Error::Infeasible { what: what(), asked, reason });
    }
    let mut kept: Vec<usize> = pool.iter().map(|queue| queue.blocks()).collect();
    let mut excess = pool.iter().map(|queue| measured(queue, queue.blocks())).sum::<usize>().saturating_sub(keep);
    let mut hits = Vec::new();
    if excess > 0 {
        let mut blocks: Vec<(f64, u32, u32)> = Vec::with_capacity(kept.iter().sum::<usize>());
        for (index, queue) in pool.iter().enumerate() {
            blocks.extend((0..kept[index]).map(|block| (queue.block_score(block), index as u32, block as u32)));
        }
        // Stable: blocks stand in natural order, so that ties are settled.
        blocks.par_sort_by(|a, b| compare(a.0, b.0));
        let mut closed = vec![false; pool.len()];
        for (_, index, block) in blocks {
            if excess == 0 {
                break;
            }
            let (queue, block) = (pool[index as usize], block as usize);
            if closed[index as usize] {
                continue;
            }
            let lost = if measure == Measure::Units { queue.block_units(block) } else { 1 };
            if block >= queue.blocks() - queue.floor {
                hits.extend(queue.owners(block));
            } else if side == Side::AtLeast && lost > excess {
                closed[index as usize] = true;
            } else {
                kept[index as usize] -= 1;
                excess = excess.saturating_sub(lost);
            }
        }
        hits.sort_unstable();
        hits.dedup();
    }
    Ok((kept, hits))
}

/// Order of finite numbers, in which 0.0 and -0.0 are equal.
pub(crate) fn compare(a: f64, b: f64) -> std::cmp::Ordering {
    a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal)
}
