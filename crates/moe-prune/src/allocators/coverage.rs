//! Budgets by coverage: what a layer and an expert keep is a part of their own scores.

use moe_checkpoint::{Granularity, Pool, WholeScores};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, Limits, apportion};
use crate::paths::{Problem, Within};
use crate::probe::ModelProbe;
use crate::ranking::{Queue, Side, compare};
use crate::recipe::tagged;
use crate::{Error, Needs, Result};

/// Shares a budget of units out over layers and then over experts by how much of their scores is covered, as
/// MoE-Slimming (ICML 2026) does. Takes unit scores with weights of wholes beside them
/// ([`WholeScores`]), as the scorer `slimming` makes.
///
/// - **Layers.** Scores of a layer are those of its units times the weight of their expert, not below 0, in descending
///   order. A layer of weight w keeps the least that covers a part `s w` of their sum, for the one level s that meets
///   the budget. The weights are those of the layers, smoothed: [`smoothing`](Self::smoothing) times their square root,
///   each time clamped to one standard deviation around the mean, then divided by the mean.
/// - **Experts.** Of what the layer keeps, an expert of weight a keeps its best units that cover a part `m c` of its
///   own sum, with `c = sqrt(max(a, 0))` as a share of the layer, at least 1e-6, for the one m that meets the layer's
///   number. So an important expert keeps a larger part of its own scores, and a flat one many units for it.
/// - **Narrow experts.** What is narrower than [`min_units`](Self::min_units) goes as a whole; its units go to layers
///   in proportion to the room that their other experts have, and to these experts likewise. With
///   [`remove_emptied`](Self::remove_emptied), experts without units go with their rows of the router.
///
/// The released code looks for s and m by 32 bisections, and then adds or drops single units; here the level at which
/// every unit enters is sorted, which is what the bisections approach and meets the budget exactly. Where the release
/// keeps s at 1 at most, so that layers of a weight below 1 are never whole and small ratios fail, s goes on. Where all
/// scores of a layer or an expert are 0, they count alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Coverage {
    /// How often the square root of the weights of layers is taken; 4 as released, 0 takes them as they are. Above 8
    /// all layers weigh the same.
    pub smoothing: usize,
    /// Experts that would keep fewer units lose all: 16 in the published training runs.
    pub min_units: usize,
    /// Whether experts that lose all of their units go with their rows of the router. As many as the router selects
    /// must stay.
    pub remove_emptied: bool,
}

impl Default for Coverage {
    /// Four square roots; no minimum; emptied experts go.
    fn default() -> Self {
        Self { smoothing: 4, min_units: 0, remove_emptied: true }
    }
}

/// Weights of experts of a layer are shares of at least this.
const FLOOR: f64 = 1e-6;

impl Allocator for Coverage {
    fn recipe(&self) -> Value {
        tagged("coverage", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        let pool = Pool::Layer;
        Needs::new(granularity, pool)
            .adding(pool, "the part of the scores of a layer that is covered")
            .weighing_wholes()
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        if let Limits::Experts(_) = request.limits {
            return Err(Error::NeedsUnitScores);
        }
        request.validate(&self.needs(Granularity::Unit), probe)?;
        // All layers have them: that was checked.
        let wholes: Vec<&WholeScores> = request.scores.layers.iter().filter_map(|layer| layer.whole.as_ref()).collect();
        let problem = Problem::new(request, Within::Expert)?;
        let weights = smoothed(&wholes.iter().map(|whole| f64::from(whole.layer)).collect::<Vec<_>>(), self.smoothing);
        let size = problem.step;
        // Blocks of a layer: a budget that no block meets ends on its side.
        let total = match request.budget.side() {
            Side::AtLeast => problem.keep.div_ceil(size),
            Side::AtMost => problem.keep / size,
        };
        let per_layer = layers(&problem.queues, &wholes, &weights, total);
        let mut blocks: Vec<Vec<usize>> = problem
            .queues
            .iter()
            .zip(&wholes)
            .zip(per_layer)
            .map(|((queues, whole), keep)| experts(queues, whole, keep))
            .collect();
        let least = self.min_units.div_ceil(size);
        let lost = evict(&problem.queues, &mut blocks, least);
        let mut allocation =
            Allocation::of_blocks(self.recipe(), request, &problem.queues, &blocks, problem.asked, Vec::new())?;
        if lost > 0 {
            let what = format!(
                "{} units of experts narrower than {} go, for which no other expert has room",
                lost * size,
                self.min_units
            );
            allocation.notes.push(what);
        }
        if self.remove_emptied {
            for layer in &mut allocation.layers {
                let kept = layer.experts();
                if kept < request.shape.top_k.min(layer.kept.len()) {
                    return Err(Error::Infeasible {
                        what: format!("layer {}", layer.layer),
                        asked: layer.units(),
                        reason: format!(
                            "{kept} of its experts keep units, but the router selects {}: let narrower experts stay, or \
                             emptied ones keep their rows of the router (remove_emptied: false)",
                            request.shape.top_k
                        ),
                    });
                }
                let empty = |(expert, kept): (usize, &Vec<u32>)| kept.is_empty().then_some(expert as u32);
                layer.removed = layer.kept.iter().enumerate().filter_map(empty).collect();
            }
        }
        Ok(allocation)
    }
}

/// Weights of layers, smoothed; a mean of 1.
fn smoothed(weights: &[f64], times: usize) -> Vec<f64> {
    let mut weights = weights.to_vec();
    let count = weights.len().max(1) as f64;
    for _ in 0..times {
        weights.iter_mut().for_each(|weight| *weight = weight.sqrt());
        let mean = weights.iter().sum::<f64>() / count;
        let deviation = match weights.len() {
            0 | 1 => 0.0,
            n => (weights.iter().map(|weight| (weight - mean).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt(),
        };
        weights.iter_mut().for_each(|weight| *weight = weight.clamp(mean - deviation, mean + deviation));
    }
    let mean = weights.iter().sum::<f64>() / count;
    weights.iter().map(|weight| if mean > 0.0 { weight / mean } else { 1.0 }).collect()
}

/// A block that may stay.
struct Candidate {
    /// The level at which it enters: what the blocks before it cover, by the weight.
    level: f64,
    /// Its score, which settles ties.
    score: f64,
    /// Who keeps it.
    owner: usize,
}

/// Candidates of one owner from the scores of its blocks, best first. `floor` of them enter before all others.
fn candidates(scores: &[f64], weight: f64, owner: usize, floor: usize, into: &mut Vec<Candidate>) {
    let total: f64 = scores.iter().map(|score| score.max(0.0)).sum();
    let mut covered = 0.0;
    for (place, score) in scores.iter().enumerate() {
        let part = if total > 0.0 { covered / total } else { place as f64 / scores.len() as f64 };
        let level = match place < floor {
            true => f64::NEG_INFINITY,
            // A weight of 0 enters last, in order.
            false if weight > 0.0 => part / weight,
            false => f64::MAX,
        };
        into.push(Candidate { level, score: *score, owner });
        covered += score.max(0.0);
    }
}

/// How many candidates of each of `owners` are among the first `keep`: by level, then the higher score, then the
/// earlier owner.
fn first(mut candidates: Vec<Candidate>, owners: usize, keep: usize) -> Vec<usize> {
    // Stable: the candidates of an owner stand in order.
    candidates.sort_by(|a, b| {
        compare(a.level, b.level).then_with(|| compare(b.score, a.score)).then_with(|| a.owner.cmp(&b.owner))
    });
    let mut counts = vec![0; owners];
    candidates.iter().take(keep).for_each(|candidate| counts[candidate.owner] += 1);
    counts
}

/// Scores of the blocks of a queue, best first.
fn best_first(queue: &Queue) -> Vec<f64> {
    (0..queue.blocks()).rev().map(|block| queue.block_score(block)).collect()
}

/// Blocks that every layer keeps of `total`.
fn layers(queues: &[Vec<Queue>], wholes: &[&WholeScores], weights: &[f64], total: usize) -> Vec<usize> {
    let mut all = Vec::new();
    for (layer, ((queues, whole), weight)) in queues.iter().zip(wholes).zip(weights).enumerate() {
        let of_queue = |(queue, expert): (&Queue, &f32)| {
            best_first(queue).into_iter().map(move |score| score * f64::from(*expert)).collect::<Vec<_>>()
        };
        let mut scores: Vec<f64> = queues.iter().zip(&whole.experts).flat_map(of_queue).collect();
        scores.sort_by(|a, b| compare(*b, *a));
        let floor = queues.iter().map(|queue| queue.floor).sum();
        candidates(&scores, *weight, layer, floor, &mut all);
    }
    first(all, queues.len(), total)
}

/// Blocks that every expert of a layer keeps of `keep`.
fn experts(queues: &[Queue], whole: &WholeScores, keep: usize) -> Vec<usize> {
    let roots: Vec<f64> = whole.experts.iter().map(|weight| f64::from(*weight).max(0.0).sqrt()).collect();
    let total: f64 = roots.iter().sum();
    let mut all = Vec::new();
    for (owner, ((queue, root), weight)) in queues.iter().zip(roots).zip(&whole.experts).enumerate() {
        let share = if total > 0.0 { (root / total).max(FLOOR) } else { 1.0 };
        let scores: Vec<f64> = best_first(queue).into_iter().map(|score| score * f64::from(*weight)).collect();
        candidates(&scores, share, owner, queue.floor, &mut all);
    }
    first(all, queues.len(), keep)
}

/// Empties experts of fewer than `least` blocks that nothing holds, and gives their blocks to the others. What finds no
/// room is returned.
fn evict(queues: &[Vec<Queue>], blocks: &mut [Vec<usize>], least: usize) -> usize {
    let mut freed = 0;
    let holds = |queue: &Queue, kept: usize| kept == 0 || kept >= least || queue.floor > 0;
    for (queues, blocks) in queues.iter().zip(blocks.iter_mut()) {
        for (queue, kept) in queues.iter().zip(blocks.iter_mut()) {
            if !holds(queue, *kept) {
                freed += std::mem::take(kept);
            }
        }
    }
    if freed == 0 {
        return 0;
    }
    let room = |queues: &[Queue], blocks: &[usize]| -> Vec<usize> {
        let open = |(queue, kept): (&Queue, &usize)| if *kept > 0 { queue.blocks() - kept } else { 0 };
        queues.iter().zip(blocks).map(open).collect()
    };
    let share = |rooms: &[usize], amount: usize| -> Vec<usize> {
        let all: usize = rooms.iter().sum();
        let quotas: Vec<u128> = rooms.iter().map(|room| *room as u128 * amount.min(all) as u128).collect();
        apportion(&quotas, all.max(1) as u128, amount.min(all), rooms)
    };
    let rooms: Vec<usize> = queues.iter().zip(&*blocks).map(|(q, b)| room(q, b).iter().sum()).collect();
    let given = share(&rooms, freed);
    for ((queues, blocks), amount) in queues.iter().zip(blocks.iter_mut()).zip(&given) {
        let more = share(&room(queues, blocks), *amount);
        blocks.iter_mut().zip(more).for_each(|(kept, more)| *kept += more);
    }
    freed -= given.iter().sum::<usize>();
    // Where the others are full, the least is what an emptied expert may come back with.
    for (queues, blocks) in queues.iter().zip(blocks.iter_mut()) {
        for (queue, kept) in queues.iter().zip(blocks.iter_mut()) {
            if *kept == 0 && least > 0 && freed >= least && queue.blocks() >= least {
                *kept = least;
                freed -= least;
            }
        }
    }
    freed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_square_roots_leave_little_of_a_spread_of_three_hundred() {
        let losses: Vec<f64> = (0..10).map(|l| 300f64.powf(f64::from(l) / 9.0)).collect();
        let found = smoothed(&losses, 4);
        assert!((found.iter().sum::<f64>() / 10.0 - 1.0).abs() < 1e-12);
        let (low, high) = (found[0], found[9]);
        assert!((low - 0.927).abs() < 2e-2 && (high - 1.074).abs() < 2e-2, "{low} to {high}");
        assert_eq!(smoothed(&[1.0, 3.0], 0), [0.5, 1.5]);
        assert_eq!(smoothed(&[0.0, 0.0], 4), [1.0, 1.0]);
    }

    #[test]
    fn what_is_covered_before_it_says_when_a_block_enters() {
        let mut all = Vec::new();
        candidates(&[6.0, 3.0, 1.0], 2.0, 0, 0, &mut all);
        let levels: Vec<f64> = all.iter().map(|candidate| candidate.level).collect();
        assert_eq!(levels, [0.0, 0.3, 0.45]);
        let mut zeros = Vec::new();
        candidates(&[0.0, 0.0, 0.0, 0.0], 1.0, 0, 1, &mut zeros);
        let levels: Vec<f64> = zeros.iter().map(|candidate| candidate.level).collect();
        assert_eq!(levels, [f64::NEG_INFINITY, 0.25, 0.5, 0.75]);
        // The layer of one dominant unit keeps one; the flat one keeps what the level asks of it.
        let mut both = Vec::new();
        candidates(&[97.0, 1.0, 1.0, 1.0], 1.0, 0, 0, &mut both);
        candidates(&[1.0, 1.0, 1.0, 1.0], 1.0, 1, 0, &mut both);
        assert_eq!(first(both, 2, 5), [1, 4]);
    }
}
