//! Searching for shorter or better paths through the layers of a model (Dr.LLM).

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{LayerPath, PathStep};
use crate::error::{Error, Result};

/// How often every layer runs: 0, 1 or 2.
pub type Rounds = Vec<u8>;

/// Monte Carlo tree search over paths (Dr.LLM, arXiv 2510.12773, and its code): from all layers once, every step skips
/// one or two neighbors or repeats one layer. A node is descended into by
/// `Q / n + exploration sqrt(ln N / n) - length_penalty * length / L`, now and then at random. The reward of a path is
/// whatever the caller says of it, such as 1 where the answer is right.
///
/// The reference lets a layer be repeated more than twice, which no label of three classes can hold, and counts the
/// path itself as an action: here layers run at most twice, and every action changes the path. It also ends the search
/// with the first wrong answer that turns right; [`stop_early`](Self::stop_early) says so.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathSearch {
    /// Paths that are tried, the whole one not counted: 50 to 200 in the reference.
    pub simulations: usize,
    /// Weight of what was tried seldom.
    pub exploration: f64,
    /// Weight of the length of a path.
    pub length_penalty: f64,
    /// Share of descents that are random.
    pub random: f64,
    /// Layers that one skip leaves out, at most.
    pub most_skipped: usize,
    /// Layers that run in all, at most, as a multiple of those of the model.
    pub longest: f64,
    /// Ends with the first wrong answer that becomes right, or a right one on a path of two layers less.
    pub stop_early: bool,
    /// Seed of the random descents.
    pub seed: u64,
}

impl Default for PathSearch {
    fn default() -> Self {
        Self {
            simulations: 200,
            exploration: 1.8,
            length_penalty: 3.0,
            random: 0.1,
            most_skipped: 2,
            longest: 2.0,
            stop_early: true,
            seed: 0,
        }
    }
}

/// What a search found for one sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FoundPath {
    /// How often every layer runs on the best path: the shortest with a reward of 1, and of these the one with the
    /// fewest different layers; the whole model's path where there is none.
    pub rounds: Rounds,
    /// Its reward.
    pub reward: f64,
    /// The reward of the whole model.
    pub whole: f64,
    /// Paths that were tried.
    pub tried: usize,
}

impl FoundPath {
    /// The path.
    pub fn path(&self) -> LayerPath {
        path_of(&self.rounds)
    }
}

/// Every layer as often as it runs, one round after the other.
pub fn path_of(rounds: &[u8]) -> LayerPath {
    let steps = rounds.iter().enumerate();
    LayerPath::new(steps.flat_map(|(layer, n)| std::iter::repeat_n(PathStep::whole(layer), usize::from(*n))).collect())
}

#[derive(Default)]
struct Node {
    visits: f64,
    reward: f64,
    children: Option<Vec<Rounds>>,
}

fn length(rounds: &[u8]) -> usize {
    rounds.iter().map(|n| usize::from(*n)).sum()
}

impl PathSearch {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.random) {
            return Err(Error::input("random", self.random, "a share in [0, 1]"));
        }
        if self.most_skipped == 0 {
            return Err(Error::input("most_skipped", 0, "at least 1"));
        }
        for (field, value) in
            [("exploration", self.exploration), ("length_penalty", self.length_penalty), ("longest", self.longest)]
        {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::input(field, value, "a finite number of 0 or more"));
            }
        }
        Ok(())
    }

    /// Paths that differ from this one by one action.
    fn actions(&self, rounds: &Rounds) -> Vec<Rounds> {
        let running: Vec<usize> = (0..rounds.len()).filter(|layer| rounds[*layer] == 1).collect();
        let mut found = Vec::new();
        for (at, first) in running.iter().enumerate() {
            for n in 1..=self.most_skipped {
                let span = &running[at..(at + n).min(running.len())];
                let neighbors = span.len() == n && span[n - 1] - first == n - 1;
                if neighbors && length(rounds) > n {
                    let mut next = rounds.clone();
                    span.iter().for_each(|layer| next[*layer] = 0);
                    found.push(next);
                }
            }
            if (length(rounds) + 1) as f64 <= self.longest * rounds.len() as f64 {
                let mut next = rounds.clone();
                next[*first] = 2;
                found.push(next);
            }
        }
        found
    }

    /// Searches for a path of a model with so many layers; `reward` runs a path, and says how good it is, from 0 to 1.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Input`] for no layers or a reward that is no number; whatever `reward`
    /// returns.
    pub fn search(&self, layers: usize, mut reward: impl FnMut(&LayerPath) -> Result<f64>) -> Result<FoundPath> {
        self.validate()?;
        if layers == 0 {
            return Err(Error::input("layers", 0, "at least one"));
        }
        let mut ask = |rounds: &Rounds| -> Result<f64> {
            let found = reward(&path_of(rounds))?;
            match found.is_nan() {
                true => Err(Error::input("reward of a path", found, "a number")),
                false => Ok(found),
            }
        };
        let start: Rounds = vec![1; layers];
        let whole = ask(&start)?;
        let mut rewards: BTreeMap<Rounds, f64> = [(start.clone(), whole)].into();
        let mut nodes: BTreeMap<Rounds, Node> = BTreeMap::new();
        nodes.insert(start.clone(), Node { visits: 1.0, reward: whole, children: None });
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        for _ in 0..self.simulations {
            let mut way = vec![start.clone()];
            loop {
                let at = way[way.len() - 1].clone();
                let children = match nodes.entry(at.clone()).or_default().children.clone() {
                    Some(children) => children,
                    None => {
                        let children = self.actions(&at);
                        nodes.entry(at.clone()).or_default().children = Some(children.clone());
                        children
                    }
                };
                if children.is_empty() {
                    break;
                }
                let total = nodes[&at].visits.max(1.0);
                let score = |child: &Rounds| -> f64 {
                    let long = self.length_penalty * length(child) as f64 / layers as f64;
                    match nodes.get(child).filter(|node| node.visits > 0.0) {
                        None => f64::MAX / 2.0 - long,
                        Some(node) => {
                            node.reward / node.visits + self.exploration * (total.ln() / node.visits).sqrt() - long
                        }
                    }
                };
                let chosen = match random.random::<f64>() < self.random {
                    true => random.random_range(0..children.len()),
                    false => {
                        // of equals, one by chance: else the first layers would always be tried first
                        let first = random.random_range(0..children.len());
                        let order = (0..children.len()).map(|i| (i + first) % children.len());
                        order.max_by(|a, b| score(&children[*a]).total_cmp(&score(&children[*b]))).unwrap_or(0)
                    }
                };
                way.push(children[chosen].clone());
                if nodes.get(&children[chosen]).is_none_or(|node| node.visits == 0.0) {
                    break;
                }
            }
            let leaf = way[way.len() - 1].clone();
            let found = match rewards.get(&leaf) {
                Some(found) => *found,
                None => {
                    let found = ask(&leaf)?;
                    rewards.insert(leaf.clone(), found);
                    found
                }
            };
            for step in &way {
                let node = nodes.entry(step.clone()).or_default();
                (node.visits, node.reward) = (node.visits + 1.0, node.reward + found);
            }
            let better = found >= 1.0 && (whole < 1.0 || length(&leaf) + 2 <= layers);
            if self.stop_early && better {
                break;
            }
        }
        let different = |rounds: &Rounds| rounds.iter().filter(|n| **n > 0).count();
        let right = rewards.iter().filter(|(_, reward)| **reward >= 1.0).map(|(rounds, _)| rounds);
        let best = right.min_by_key(|rounds| (length(rounds), different(rounds))).cloned().unwrap_or(start);
        let tried = rewards.len() - 1;
        Ok(FoundPath { reward: rewards[&best], rounds: best, whole, tried })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_enough_simulations_it_finds_what_trying_everything_finds() {
        // right where layers 1 and 2 are skipped and 3 runs, or 0 runs twice
        let right = |rounds: &[u8]| {
            (rounds[1] == 0 && rounds[2] == 0 && rounds[3] > 0 && rounds[0] > 0) || (rounds[0] == 2 && rounds[3] == 0)
        };
        let mut shortest = usize::MAX;
        for code in 0..81 {
            let rounds: Rounds = (0..4).map(|i| (code / 3usize.pow(i) % 3) as u8).collect();
            if right(&rounds) {
                shortest = shortest.min(length(&rounds));
            }
        }
        let search = PathSearch { simulations: 600, stop_early: false, ..PathSearch::default() };
        let as_rounds = |path: &LayerPath| -> Rounds {
            (0..4).map(|layer| path.steps().iter().filter(|step| step.layer == layer).count() as u8).collect()
        };
        for seed in 0..5 {
            let found = PathSearch { seed, ..search }
                .search(4, |path| Ok(f64::from(u8::from(right(&as_rounds(path))))))
                .unwrap();
            assert_eq!((found.whole, found.reward, length(&found.rounds)), (0.0, 1.0, shortest));
            assert!(found.rounds.iter().all(|n| *n <= 2) && found.tried <= 81);
        }
    }

    #[test]
    fn a_hopeless_sample_keeps_the_whole_path_and_an_early_stop_saves_trials() {
        let search = PathSearch { simulations: 40, ..PathSearch::default() };
        let none = search.search(6, |_| Ok(0.0)).unwrap();
        assert_eq!((none.rounds, none.reward), (vec![1; 6], 0.0));
        let mut asked = 0;
        let easy = search
            .search(6, |_| {
                asked += 1;
                Ok(1.0)
            })
            .unwrap();
        assert!(asked < 20 && length(&easy.rounds) <= 4, "{asked} {easy:?}");
        assert!(search.search(6, |_| Ok(f64::NAN)).is_err() && search.search(0, |_| Ok(1.0)).is_err());
        let error = PathSearch { random: 2.0, ..search }.search(2, |_| Ok(1.0)).unwrap_err().to_string();
        assert!(error.contains("random: found 2"), "{error}");
    }

    #[test]
    fn paths_repeat_layers_in_place() {
        assert_eq!(path_of(&[1, 0, 2, 1]).to_string(), "0,2,2-3");
    }
}
