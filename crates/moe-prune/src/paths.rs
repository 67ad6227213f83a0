//! Paths of removal: what goes first, second, third in a layer or an expert, so that an allocator only has to say how
//! far each of them is walked.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use moe_checkpoint::{ExpertId, Pool};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::allocators::{Allocation, AllocationRequest, common_step, round_kept};
use crate::plan::LayerKept;
use crate::ranking::{Queue, Side, compare, queues};
use crate::{Error, Result};

/// What is walked in one piece when the units of experts go. Whole experts always go layer by layer, lowest score
/// first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Within {
    /// A layer, whose units compete: lowest score first.
    #[default]
    Compete,
    /// A layer, whose experts narrow together: the widest loses the next block, so that widths stay as equal as they
    /// can.
    Even,
    /// Every expert by itself.
    Expert,
}

impl Within {
    /// What units have to be comparable over for paths of this kind.
    pub(crate) fn pool(self) -> Pool {
        match self {
            Self::Compete => Pool::Layer,
            Self::Even | Self::Expert => Pool::Expert,
        }
    }
}

/// One path: the order in which the blocks of a layer or an expert go.
pub(crate) struct Path {
    /// Position among the MoE layers.
    pub layer: usize,
    /// Its queues in the layer.
    queues: Range<usize>,
    /// Queue of every step, counted from the first one of the path.
    steps: Vec<u32>,
    /// Units gone before every step, and after the last: `steps + 1` numbers. What always goes counts.
    pub units: Vec<usize>,
    /// Scores gone, likewise.
    pub scores: Vec<f64>,
    /// Units there are.
    pub total: usize,
}

impl Path {
    fn new(layer: usize, queues: Range<usize>, of_layer: &[Queue], even: bool) -> Self {
        let pool = &of_layer[queues.clone()];
        let free = |queue: &Queue| queue.blocks() - queue.floor;
        let order: Vec<(u32, u32)> = if even {
            let entry = |index: usize, block: usize| {
                let queue = &pool[index];
                (block < free(queue)).then(|| (queue.kept_units(queue.blocks() - block), Reverse(index), block))
            };
            let mut widest: BinaryHeap<_> = (0..pool.len()).filter_map(|index| entry(index, 0)).collect();
            let mut order = Vec::new();
            while let Some((_, Reverse(index), block)) = widest.pop() {
                order.push((index as u32, block as u32));
                widest.extend(entry(index, block + 1));
            }
            order
        } else {
            let mut blocks: Vec<(f64, u32, u32)> = Vec::new();
            for (index, queue) in pool.iter().enumerate() {
                blocks.extend((0..free(queue)).map(|block| (queue.block_score(block), index as u32, block as u32)));
            }
            blocks.par_sort_by(|a, b| compare(a.0, b.0));
            blocks.into_iter().map(|(_, index, block)| (index, block)).collect()
        };
        let total: usize = pool.iter().map(|queue| queue.kept_units(queue.blocks())).sum();
        let mut path = Self {
            layer,
            queues,
            steps: order.iter().map(|(index, _)| *index).collect(),
            units: vec![0],
            scores: vec![pool.iter().map(|queue| queue.dropped_score(queue.blocks())).sum()],
            total,
        };
        let (mut units, mut scores) = (0, path.scores[0]);
        for (index, block) in order {
            let queue = &pool[index as usize];
            units += queue.block_units(block as usize);
            scores += queue.block_score(block as usize);
            path.units.push(units);
            path.scores.push(scores);
        }
        path
    }

    /// The end of the path.
    pub fn end(&self) -> usize {
        self.steps.len()
    }

    /// Units that stay at a position.
    pub fn kept(&self, position: usize) -> usize {
        self.total - self.units[position]
    }

    /// The first position at which at most `units` stay; the end if more always do.
    pub fn position(&self, units: usize) -> usize {
        let gone = self.total.saturating_sub(units);
        self.units.partition_point(|lost| *lost < gone).min(self.end())
    }
}

/// A request as paths and a number of units to keep.
pub(crate) struct Problem<'a> {
    pub request: &'a AllocationRequest<'a>,
    pub queues: Vec<Vec<Queue>>,
    pub paths: Vec<Path>,
    /// Units to keep: reachable where all blocks are of one size.
    pub keep: usize,
    /// Units that the budget alone would drop.
    pub asked: usize,
    /// Every number of units that a step removes is a multiple of this.
    pub step: usize,
}

impl<'a> Problem<'a> {
    pub fn new(request: &'a AllocationRequest<'a>, within: Within) -> Result<Self> {
        Self::of_queues(request, within, queues(request)?)
    }

    pub fn of_queues(request: &'a AllocationRequest<'a>, within: Within, queues: Vec<Vec<Queue>>) -> Result<Self> {
        let mut paths = Vec::new();
        for (layer, of_layer) in queues.iter().enumerate() {
            match within {
                Within::Expert => {
                    paths.extend((0..of_layer.len()).map(|i| Path::new(layer, i..i + 1, of_layer, false)))
                }
                _ => paths.push(Path::new(layer, 0..of_layer.len(), of_layer, within == Within::Even)),
            }
        }
        let budget = request.budget;
        let keep = budget.kept_units(request.shape);
        let step = common_step(queues.iter().flatten());
        let widest = paths.iter().map(|path| path.total).sum();
        let problem = Self {
            request,
            asked: request.shape.units() - keep,
            keep: round_kept(budget, keep, step, widest),
            step,
            queues,
            paths,
        };
        let floors: usize = problem.paths.iter().map(|path| path.kept(path.end())).sum();
        if floors > problem.keep {
            let reason = format!("protection, minimum sizes and what the router selects need {floors}");
            return Err(Error::Infeasible { what: "the model".into(), asked: problem.keep, reason });
        }
        Ok(problem)
    }

    /// Units of the owner of a path that are gone at a position, those of an earlier round included.
    pub fn dropped(&self, path: usize, position: usize) -> usize {
        let found = &self.paths[path];
        let shape = &self.request.shape.layers[found.layer];
        let queues = &self.queues[found.layer][found.queues.clone()];
        let all = match queues.first().and_then(|queue| queue.expert) {
            Some(expert) if queues.len() == 1 => shape.widths[expert],
            _ => shape.units(),
        };
        all - found.kept(position)
    }

    /// Units of a path that stay with these numbers of kept blocks `[MoE layer][queue]`.
    pub fn kept_of(&self, path: &Path, blocks: &[Vec<usize>]) -> usize {
        let queues = self.queues[path.layer][path.queues.clone()].iter();
        queues.zip(&blocks[path.layer][path.queues.clone()]).map(|(queue, blocks)| queue.kept_units(*blocks)).sum()
    }

    /// Units kept at these positions.
    pub fn kept(&self, positions: &[usize]) -> usize {
        self.paths.iter().zip(positions).map(|(path, position)| path.kept(*position)).sum()
    }

    /// Kept blocks `[MoE layer][queue]` at these positions.
    pub fn blocks(&self, positions: &[usize]) -> Vec<Vec<usize>> {
        let mut blocks: Vec<Vec<usize>> =
            self.queues.iter().map(|queues| queues.iter().map(Queue::blocks).collect()).collect();
        for (path, position) in self.paths.iter().zip(positions) {
            for step in &path.steps[..*position] {
                blocks[path.layer][path.queues.start + *step as usize] -= 1;
            }
        }
        blocks
    }

    /// What stays at these positions, as a plan has it.
    pub fn layers(&self, positions: &[usize]) -> Vec<LayerKept> {
        self.request.layers(&self.queues, &self.blocks(positions))
    }

    /// Walks paths on and back, so that the budget is met as well as blocks allow, on its side: of a ratio no fewer
    /// than [`Problem::keep`] units stay, of parameters no more. `gain(path, position)` is what walking back from
    /// `position` by one step is worth; the worthiest per unit goes first (ties: the later path).
    pub fn settle(&self, positions: &mut [usize], gain: impl Fn(usize, usize) -> f64) {
        let worth = |index: usize, to: usize| {
            let path = &self.paths[index];
            gain(index, to) / (path.units[to] - path.units[to - 1]).max(1) as f64
        };
        let mut kept = self.kept(positions);
        let step = |index: usize, to: usize| self.paths[index].units[to] - self.paths[index].units[to - 1];
        let on = |positions: &[usize], fits: &dyn Fn(usize) -> bool| {
            let open = (0..positions.len()).filter(|index| positions[*index] < self.paths[*index].end());
            let open = open.filter(|index| fits(step(*index, positions[*index] + 1)));
            open.min_by(|a, b| compare(worth(*a, positions[*a] + 1), worth(*b, positions[*b] + 1)))
        };
        let back = |positions: &[usize], fits: &dyn Fn(usize) -> bool| {
            let open = (0..positions.len()).filter(|index| positions[*index] > 0);
            let open = open.filter(|index| fits(step(*index, positions[*index])));
            open.max_by(|a, b| compare(worth(*a, positions[*a]), worth(*b, positions[*b])))
        };
        let keep = self.keep;
        // Over to the side that the budget allows, then back as far as fits.
        match self.request.budget.side() {
            Side::AtMost => {
                while let Some(index) = on(positions, &|_| true).filter(|_| kept > keep) {
                    positions[index] += 1;
                    kept -= step(index, positions[index]);
                }
                while let Some(index) = back(positions, &|units| kept + units <= keep) {
                    kept += step(index, positions[index]);
                    positions[index] -= 1;
                }
            }
            Side::AtLeast => {
                while let Some(index) = back(positions, &|_| true).filter(|_| kept < keep) {
                    kept += step(index, positions[index]);
                    positions[index] -= 1;
                }
                while let Some(index) = on(positions, &|units| kept >= keep + units) {
                    positions[index] += 1;
                    kept -= step(index, positions[index]);
                }
            }
        }
    }

    /// The allocation at these positions. Experts that could not lose more count as floor hits.
    pub fn allocation(&self, allocator: Value, positions: &[usize]) -> Result<Allocation> {
        let mut hits = Vec::new();
        for (path, position) in self.paths.iter().zip(positions) {
            if *position < path.end() {
                continue;
            }
            for queue in self.queues[path.layer][path.queues.clone()].iter().filter(|queue| queue.floor > 0) {
                match queue.expert {
                    Some(expert) => hits.push(ExpertId { layer: queue.layer, expert }),
                    None => hits.extend(
                        queue
                            .kept(queue.floor)
                            .into_iter()
                            .map(|expert| ExpertId { layer: queue.layer, expert: expert as usize }),
                    ),
                }
            }
        }
        hits.sort_unstable();
        Allocation::of_blocks(allocator, self.request, &self.queues, &self.blocks(positions), self.asked, hits)
    }
}
