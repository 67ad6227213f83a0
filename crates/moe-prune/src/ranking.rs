//! The order in which units go, and how a pool of experts shares a number of kept units.

use moe_checkpoint::{LayerScores, MoeLayerShape};
use rayon::prelude::*;

use crate::allocators::{AllocationRequest, ExpertId};
use crate::{Error, Result};

/// The units of one expert in the order in which they go: unprotected before protected, lowest score first, lower
/// index first. Kept units are always a tail of it.
pub(crate) struct Ranking<'a> {
    pub id: ExpertId,
    order: Vec<u32>,
    scores: &'a [f32],
    /// Widest width allowed: the largest multiple that fits.
    pub widest: usize,
    /// Narrowest width allowed: what protection and the minimum width ask for, as a multiple.
    pub floor: usize,
}

impl<'a> Ranking<'a> {
    fn new(request: &AllocationRequest<'_>, id: ExpertId, scores: &'a [f32]) -> Result<Self> {
        let ExpertId { layer, expert } = id;
        let (width, limits) = (scores.len(), request.limits);
        let mut order: Vec<u32> = (0..width as u32).collect();
        let protected = request.protect.count(layer, expert, width);
        let is_protected = |unit: u32| protected > 0 && request.protect.is_protected(layer, expert, unit);
        // Stable, so that equal scores stay in index order. Scores are finite: the table was validated.
        order.sort_by(|a, b| {
            is_protected(*a)
                .cmp(&is_protected(*b))
                .then(compare(scores[*a as usize].into(), scores[*b as usize].into()))
        });
        let widest = width - width % limits.round_to;
        let wanted = protected.max(limits.min_width.min(width));
        let floor = wanted.next_multiple_of(limits.round_to);
        if floor > widest {
            return Err(Error::Infeasible {
                what: id.to_string(),
                asked: widest,
                reason: format!(
                    "{protected} of its {width} units are protected and the minimum width is {}; the width must be a multiple of {}",
                    limits.min_width, limits.round_to
                ),
            });
        }
        Ok(Self { id, order, scores, widest, floor })
    }

    pub fn width(&self) -> usize {
        self.order.len()
    }

    /// Ids of the units that stay at this width, ascending.
    pub fn kept(&self, width: usize) -> Vec<u32> {
        let mut kept = self.order[self.order.len() - width..].to_vec();
        kept.sort_unstable();
        kept
    }

    /// Sum of the scores that go at this width, in the order they go.
    pub fn dropped_score(&self, width: usize) -> f64 {
        self.order[..self.order.len() - width].iter().map(|unit| f64::from(self.scores[*unit as usize])).sum()
    }

    /// Sum of the scores of a block of units.
    fn block_score(&self, block: std::ops::Range<usize>) -> f64 {
        self.order[block].iter().map(|unit| f64::from(self.scores[*unit as usize])).sum()
    }
}

/// Rankings of every expert, `[MoE layer][expert]`.
pub(crate) fn rank<'a>(request: &AllocationRequest<'a>) -> Result<Vec<Vec<Ranking<'a>>>> {
    let rank_layer = |(scores, MoeLayerShape { layer, .. }): (&'a LayerScores, &MoeLayerShape)| {
        let experts = scores.scores.par_iter().enumerate();
        experts.map(|(expert, values)| Ranking::new(request, ExpertId { layer: *layer, expert }, values)).collect()
    };
    request.scores.layers.iter().zip(&request.shape.layers).map(rank_layer).collect()
}

/// Widths of a pool of experts that keep `keep` units together, dropping the lowest blocks of `round_to` units first
/// (ties: earlier expert, then the block whose units go first). Also the experts that would have become narrower than
/// their floor allows.
///
/// The blocks of an expert are its ranking cut into pieces of `round_to` from the top, so their sums ascend and the
/// greedy choice is the one with the highest kept sum. With `round_to = 1` it is the plain stable ascending sort.
///
/// # Errors
/// [`Error::Infeasible`], with `what` as the pool, if the floors need more than `keep`.
pub(crate) fn share(
    pool: &[&Ranking<'_>],
    keep: usize,
    round_to: usize,
    what: impl Fn() -> String,
) -> Result<(Vec<usize>, Vec<ExpertId>)> {
    let floors: usize = pool.iter().map(|expert| expert.floor).sum();
    if floors > keep {
        let reason = format!("protected units and minimum widths need {floors}");
        return Err(Error::Infeasible { what: what(), asked: keep, reason });
    }
    let mut widths: Vec<usize> = pool.iter().map(|expert| expert.widest).collect();
    let mut excess = widths.iter().sum::<usize>().saturating_sub(keep);
    let mut floored = vec![false; pool.len()];
    if excess > 0 {
        let mut blocks: Vec<(f64, u32, bool)> = Vec::with_capacity(widths.iter().sum::<usize>() / round_to);
        for (index, expert) in pool.iter().enumerate() {
            let (start, pinned) = (expert.width() - expert.widest, expert.width() - expert.floor);
            for block in (start..expert.width()).step_by(round_to) {
                blocks.push((expert.block_score(block..block + round_to), index as u32, block >= pinned));
            }
        }
        // Stable: blocks stand in natural order, so that ties are settled.
        blocks.par_sort_by(|a, b| compare(a.0, b.0));
        for (_, index, pinned) in blocks {
            if excess == 0 {
                break;
            }
            if pinned {
                floored[index as usize] = true;
            } else {
                widths[index as usize] -= round_to;
                excess -= round_to.min(excess);
            }
        }
    }
    let hits = pool.iter().zip(floored).filter(|(_, hit)| *hit).map(|(expert, _)| expert.id).collect();
    Ok((widths, hits))
}

/// Order of finite numbers, in which 0.0 and -0.0 are equal.
fn compare(a: f64, b: f64) -> std::cmp::Ordering {
    a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal)
}
