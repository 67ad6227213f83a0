//! SMT: the blocks of the weights that get the strongest gradients are trained, and nothing else (arXiv 2405.15525).
//!
//! A warm-up sums gradients; its [scores](BlockScores) select blocks; then the blocks are trained. The published
//! warm-up is full fine-tuning, whose updates stay, and costs what that costs: [`Warmup::FullFineTuning`]. By default
//! gradients are summed at the weights as they are, [`Warmup::GradientsOnly`], which needs no f32 copy of the weights,
//! no gradients and no moments.

mod install;
mod sums;

use std::collections::{BTreeMap, BTreeSet};

use moe_core::adapters::{LayerSite, Site};
use serde::{Deserialize, Serialize};

pub use install::BlockWatch;
pub use sums::sum_gradients;

use crate::{Error, Result, model_weights::Block, trainable_tensors::Place};

/// The score of a block, of the sum A of the gradients of the warm-up steps. A is signed: gradients of different steps
/// may cancel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockScore {
    /// `|mean of A|`, the default of the released code. Needs only sums over blocks, so it costs no memory.
    #[default]
    MeanAbs,
    /// `mean of |A|`, what the paper's text describes.
    AbsMean,
    /// `sum of |A|`.
    L1,
    /// `sqrt(sum of A^2)`.
    L2,
}

/// How many blocks of a pool are trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockBudget {
    /// So many.
    Blocks(usize),
    /// This share of all blocks of the model, rounded down: of all its matrices, embeddings and output head included,
    /// as published.
    Share(f64),
}

/// What the warm-up does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// Sums gradients at the weights as they are. Departs from the paper in that the gradients of later steps are those
    /// of the first weights; at the learning rates it takes (1e-5) weights hardly move in a warm-up.
    #[default]
    GradientsOnly,
    /// Trains all weights, as published; the updates stay. 16 bytes of memory per weight with AdamW.
    FullFineTuning,
}

/// Trains the blocks of attention and of experts whose gradients were strongest in a warm-up of full fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Smt {
    /// Rows and columns of a block; blocks at the edges of a matrix it does not divide are smaller.
    pub block: usize,
    /// Score of a block.
    pub score: BlockScore,
    /// Steps of the warm-up.
    pub warmup_steps: usize,
    /// What the warm-up does.
    pub warmup: Warmup,
    /// Blocks of attention: queries, keys and values. None if not given.
    pub attention: Option<BlockBudget>,
    /// Blocks of feed-forward blocks: routed experts, shared experts, dense layers. None if not given.
    pub feed_forward: Option<BlockBudget>,
    /// Whether the output projection of attention can be chosen as well.
    pub output: bool,
    /// Whether both compete for the blocks of both.
    pub one_pool: bool,
    /// Whether the budget of a pool is shared out evenly, as the best blocks of each matrix, rather than to the best of
    /// the pool.
    pub per_matrix: bool,
}

impl Default for Smt {
    fn default() -> Self {
        Self {
            block: 256,
            score: BlockScore::MeanAbs,
            warmup_steps: 100,
            warmup: Warmup::GradientsOnly,
            attention: Some(BlockBudget::Share(0.0084)),
            feed_forward: None,
            output: false,
            one_pool: false,
            per_matrix: false,
        }
    }
}

/// The blocks to train, by map.
pub type BlockSelection = BTreeMap<Site, Vec<Block>>;

impl Smt {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [("block", self.block), ("warmup_steps", self.warmup_steps)] {
            if value == 0 {
                return Err(Error::input(field, 0, "at least 1"));
            }
        }
        for (field, budget) in [("attention", self.attention), ("feed_forward", self.feed_forward)] {
            match budget {
                Some(BlockBudget::Blocks(0)) => return Err(Error::input(field, "0 blocks", "at least 1, or nothing")),
                Some(BlockBudget::Share(share)) if !(share > 0.0 && share <= 1.0) => {
                    return Err(Error::input(field, share, "a share above 0, up to 1"));
                }
                _ => {}
            }
        }
        if self.attention.is_none() && self.feed_forward.is_none() {
            return Err(Error::input("attention and feed_forward", "no blocks", "blocks of one of them"));
        }
        Ok(())
    }

    /// Whether blocks of this map can be chosen.
    pub fn targets(&self, site: Site) -> bool {
        match site {
            Site::Layer(_, LayerSite::Router | LayerSite::SharedExpertGate) => false,
            Site::Layer(_, LayerSite::Output) => self.attention.is_some() && self.output,
            _ if site.is_attention() => self.attention.is_some(),
            _ => self.feed_forward.is_some(),
        }
    }
}

/// Sums of the gradients of a warm-up.
#[derive(Clone, Debug)]
pub struct BlockScores {
    smt: Smt,
    /// Blocks of all matrices of the model.
    total: usize,
    maps: BTreeMap<Site, Sums>,
}

#[derive(Clone, Debug)]
struct Sums {
    dims: [usize; 2],
    /// The sum of each block, or of each value.
    sums: Vec<f32>,
}

impl Sums {
    fn grid(&self, size: usize) -> [usize; 2] {
        self.dims.map(|n| n.div_ceil(size))
    }
}

impl BlockScores {
    /// Nothing summed yet, over the maps of a model. `vocabulary` are the `[rows, columns]` of its embeddings and
    /// output head, which count in shares and are never selected.
    ///
    /// # Errors
    /// As [`Smt::validate`].
    pub fn new(smt: Smt, places: &[Place], vocabulary: Vec<[usize; 2]>) -> Result<Self> {
        smt.validate()?;
        let blocks = |dims: [usize; 2]| dims.map(|n| n.div_ceil(smt.block)).iter().product::<usize>();
        let sums = |dims: [usize; 2]| match smt.score {
            BlockScore::MeanAbs => vec![0.0; blocks(dims)],
            _ => vec![0.0; dims[0] * dims[1]],
        };
        let targets = places.iter().filter(|place| smt.targets(place.site) && !place.dims.contains(&0));
        let maps = targets.map(|place| (place.site, Sums { dims: place.dims, sums: sums(place.dims) }));
        let all = places.iter().map(|place| place.dims).chain(vocabulary);
        Ok(Self { smt, total: all.map(blocks).sum(), maps: maps.collect() })
    }

    /// The maps whose gradients are summed.
    pub fn sites(&self) -> impl Iterator<Item = Site> {
        self.maps.keys().copied()
    }

    /// The sums of each map.
    pub fn arrays(&self) -> impl Iterator<Item = (Site, &[f32])> {
        self.maps.iter().map(|(site, map)| (*site, &map.sums[..]))
    }

    /// Takes sums back that [`arrays`](Self::arrays) gave.
    ///
    /// # Errors
    /// [`Error::Input`] for a map whose sums are missing or of another number.
    pub fn restore(&mut self, mut sums: impl FnMut(Site) -> Option<Vec<f32>>) -> Result<()> {
        for (site, map) in &mut self.maps {
            let found = sums(*site).unwrap_or_default();
            if found.len() != map.sums.len() {
                return Err(Error::input(format!("saved sums of {site}"), found.len(), map.sums.len()));
            }
            map.sums = found;
        }
        Ok(())
    }

    /// The same where maps may have none: their sums stay 0.
    pub(crate) fn restore_some(&mut self, mut sums: impl FnMut(Site) -> Option<Vec<f32>>) -> Result<()> {
        let zeros: BTreeMap<Site, usize> = self.maps.iter().map(|(site, map)| (*site, map.sums.len())).collect();
        self.restore(|site| sums(site).or_else(|| Some(vec![0.0; zeros[&site]])))
    }

    /// Adds the gradient `[out, in]` of a step.
    pub fn add(&mut self, site: Site, gradient: &[f32]) {
        let Some(map) = self.maps.get_mut(&site) else { return };
        match self.smt.score {
            BlockScore::MeanAbs => {
                let (size, columns) = (self.smt.block, map.dims[1]);
                let across = columns.div_ceil(size);
                for (i, row) in gradient.chunks_exact(columns).enumerate() {
                    for (j, part) in row.chunks(size).enumerate() {
                        map.sums[i / size * across + j] += part.iter().sum::<f32>();
                    }
                }
            }
            _ => map.sums.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g),
        }
    }

    /// Scores of the blocks of a map, row by row of blocks.
    fn scores(&self, map: &Sums) -> Vec<f64> {
        let [down, across] = map.grid(self.smt.block);
        let score = |row: usize, column: usize| {
            let block = Block::of(map.dims, self.smt.block, row, column);
            let n = block.len() as f64;
            if self.smt.score == BlockScore::MeanAbs {
                return f64::from(map.sums[row * across + column]).abs() / n;
            }
            let values = block.cut(&map.sums, map.dims[1]).into_iter().map(f64::from);
            match self.smt.score {
                BlockScore::AbsMean => values.map(f64::abs).sum::<f64>() / n,
                BlockScore::L1 => values.map(f64::abs).sum(),
                _ => values.map(|v| v * v).sum::<f64>().sqrt(),
            }
        };
        (0..down).flat_map(|row| (0..across).map(move |column| (row, column))).map(|(r, c)| score(r, c)).collect()
    }

    /// # Errors
    /// [`Error::Input`] for a budget that is less than a block.
    pub(crate) fn check_budget(&self) -> Result<()> {
        for (field, budget) in [("attention", self.smt.attention), ("feed_forward", self.smt.feed_forward)] {
            if let Some(budget) = budget.filter(|budget| self.count(*budget) == 0) {
                let expected =
                    format!("at least one of the model's {} blocks of {} by {1}", self.total, self.smt.block);
                return Err(Error::input(field, serde_json::json!(budget), expected));
            }
        }
        Ok(())
    }

    fn count(&self, budget: BlockBudget) -> usize {
        match budget {
            BlockBudget::Blocks(count) => count,
            BlockBudget::Share(share) => (share * self.total as f64).floor() as usize,
        }
    }

    /// The blocks with the highest scores; on a tie the earlier map, row and column. Blocks that never had a gradient,
    /// such as those of experts without tokens, are never taken.
    ///
    /// # Errors
    /// [`Error::Input`] if that leaves none.
    pub fn select(&self) -> Result<BlockSelection> {
        let attention = self.smt.attention.map_or(0, |budget| self.count(budget));
        let feed_forward = self.smt.feed_forward.map_or(0, |budget| self.count(budget));
        // whether a pool has attention, whether it has the others, and its blocks
        let pools = match self.smt.one_pool {
            true => vec![(true, true, attention + feed_forward)],
            false => vec![(true, false, attention), (false, true, feed_forward)],
        };
        let mut selected: BTreeMap<Site, BTreeSet<usize>> = BTreeMap::new();
        for (of_attention, of_others, count) in pools {
            let belongs = |site: &Site| if site.is_attention() { of_attention } else { of_others };
            let maps: Vec<_> = self.maps.iter().filter(|(site, _)| belongs(site)).collect();
            let mut best: Vec<(f64, Site, usize)> = Vec::new();
            for (site, map) in &maps {
                let scored = self.scores(map).into_iter().enumerate().filter(|(_, score)| *score > 0.0);
                let mut of_map: Vec<_> = scored.map(|(block, score)| (score, **site, block)).collect();
                if self.smt.per_matrix {
                    of_map.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.2.cmp(&b.2)));
                    of_map.truncate(count / maps.len().max(1));
                }
                best.extend(of_map);
            }
            best.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            for (_, site, block) in best.into_iter().take(count) {
                selected.entry(site).or_default().insert(block);
            }
        }
        if selected.is_empty() {
            let expected = format!("at least one of {} blocks with a gradient", self.total);
            return Err(Error::input("selected blocks", 0, expected));
        }
        let blocks = |(site, blocks): (Site, BTreeSet<usize>)| {
            let map = &self.maps[&site];
            let across = map.grid(self.smt.block)[1];
            let block = |b: usize| Block::of(map.dims, self.smt.block, b / across, b % across);
            (site, blocks.into_iter().map(block).collect())
        };
        Ok(selected.into_iter().map(blocks).collect())
    }
}

#[cfg(test)]
mod tests {
    use moe_core::adapters::ExpertSite;

    use super::*;

    const QUERY: Site = Site::Layer(0, LayerSite::Query);
    const KEY: Site = Site::Layer(0, LayerSite::Key);
    const DOWN: Site = Site::Expert { layer: 0, expert: 1, map: ExpertSite::Down };

    fn places() -> Vec<Place> {
        vec![
            Place { site: QUERY, dims: [4, 4] },
            Place { site: KEY, dims: [2, 5] }, // ragged: columns 4..5
            Place { site: Site::Layer(0, LayerSite::Router), dims: [2, 4] },
            Place { site: DOWN, dims: [4, 2] },
        ]
    }

    fn smt(score: BlockScore) -> Smt {
        Smt {
            block: 2,
            score,
            attention: Some(BlockBudget::Blocks(2)),
            feed_forward: Some(BlockBudget::Blocks(1)),
            ..Smt::default()
        }
    }

    /// Two steps that cancel in one block of the queries, and not in another.
    fn scores(smt: Smt) -> BlockScores {
        let mut scores = BlockScores::new(smt, &places(), vec![]).unwrap();
        let mut query = vec![0.0; 16];
        (query[0], query[1]) = (8.0, -8.0); // block (0, 0): cancels inside
        (query[10], query[11]) = (1.0, 1.0); // block (1, 1)
        scores.add(QUERY, &query);
        let mut other = vec![0.0; 16];
        (other[2], other[3]) = (5.0, 5.0); // block (0, 1): canceled by the next
        scores.add(QUERY, &other);
        other.iter_mut().for_each(|g| *g = -*g);
        scores.add(QUERY, &other);
        let mut key = vec![0.0; 10];
        key[4] = 1.5; // the ragged block (0, 2), of two values
        scores.add(KEY, &key);
        scores
    }

    #[test]
    fn the_four_scores_of_planted_blocks() {
        let of = |score| {
            let scores = scores(smt(score));
            [scores.scores(&scores.maps[&QUERY]), scores.scores(&scores.maps[&KEY])]
        };
        assert_eq!(of(BlockScore::MeanAbs), [vec![0.0, 0.0, 0.0, 0.5], vec![0.0, 0.0, 0.75]]);
        assert_eq!(of(BlockScore::AbsMean), [vec![4.0, 0.0, 0.0, 0.5], vec![0.0, 0.0, 0.75]]);
        assert_eq!(of(BlockScore::L1), [vec![16.0, 0.0, 0.0, 2.0], vec![0.0, 0.0, 1.5]]);
        let l2 = of(BlockScore::L2);
        assert!((l2[0][0] - 128f64.sqrt()).abs() < 1e-6 && (l2[0][3] - 2f64.sqrt()).abs() < 1e-6);
    }

    #[test]
    fn the_best_of_a_pool_are_taken_and_nothing_without_a_gradient() {
        let block = |rows, columns| Block { rows, columns };
        let found = scores(smt(BlockScore::MeanAbs)).select().unwrap();
        assert_eq!(found, [(QUERY, vec![block(2..4, 2..4)]), (KEY, vec![block(0..2, 4..5)])].into());
        let found = scores(smt(BlockScore::L1)).select().unwrap();
        assert_eq!(found, [(QUERY, vec![block(0..2, 0..2), block(2..4, 2..4)])].into());
        let per_matrix = Smt { per_matrix: true, ..smt(BlockScore::L1) };
        let found = scores(per_matrix).select().unwrap();
        assert_eq!(found, [(QUERY, vec![block(0..2, 0..2)]), (KEY, vec![block(0..2, 4..5)])].into());
        let mut with_expert = scores(smt(BlockScore::L1));
        with_expert.add(DOWN, &[0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]);
        assert_eq!(with_expert.select().unwrap()[&DOWN], [block(2..4, 0..2)]);
        let one_pool = BlockScores { smt: Smt { one_pool: true, ..smt(BlockScore::L1) }, ..with_expert };
        assert_eq!(one_pool.select().unwrap().values().map(Vec::len).sum::<usize>(), 3);
        assert!(BlockScores::new(smt(BlockScore::L1), &places(), vec![]).unwrap().select().is_err());
    }

    #[test]
    fn ties_go_to_the_earlier_block() {
        let mut scores = BlockScores::new(smt(BlockScore::L1), &places(), vec![]).unwrap();
        scores.add(KEY, &[1.0; 10]);
        scores.add(QUERY, &[1.0; 16]);
        let found = scores.select().unwrap();
        assert_eq!(found[&QUERY], [Block { rows: 0..2, columns: 0..2 }, Block { rows: 0..2, columns: 2..4 }]);
    }

    #[test]
    fn a_share_is_of_all_blocks() {
        let share = Smt { attention: Some(BlockBudget::Share(0.2)), ..smt(BlockScore::L1) };
        let scores = BlockScores::new(share, &places(), vec![]).unwrap();
        // 4 + 3 + 2 + 2 blocks
        assert_eq!((scores.total, scores.count(BlockBudget::Share(0.2))), (11, 2));
        // embeddings and head [5, 4] each: 6 more for each, as the published budget counts them
        let with = BlockScores::new(share, &places(), vec![[5, 4]; 2]).unwrap();
        assert_eq!((with.total, with.count(BlockBudget::Share(0.2))), (23, 4));
        let message = |smt: Smt| smt.validate().unwrap_err().to_string();
        assert!(
            message(Smt { attention: Some(BlockBudget::Share(1.5)), ..Smt::default() })
                .contains("attention: found 1.5")
        );
        assert!(message(Smt { block: 0, ..Smt::default() }).contains("block: found 0"));
        assert!(message(Smt { attention: None, ..Smt::default() }).contains("no blocks"));
    }
}
