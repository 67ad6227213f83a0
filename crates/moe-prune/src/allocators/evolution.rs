//! Evolution of how much every layer keeps, by what the model says.

use std::collections::BTreeMap;

use moe_checkpoint::{Granularity, Pool};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::depth_prior::spread;
use super::global::compete;
use super::{Allocation, AllocationRequest, Allocator};
use crate::paths::{Problem, Within};
use crate::probe::{Distortion, ModelProbe};
use crate::ranking::compare;
use crate::recipe::tagged;
use crate::{Error, Needs, Questions, Result};

/// Keeps the order of removal within every layer, from any score, and evolves how far each layer goes, in the manner of
/// EvoESAP (arXiv 2603.06003). Needs a probe, which runs the model once per new candidate: at most
/// `population * (generations + 1)` times.
///
/// The first candidates are the same fraction of every layer, the global ranking where scores allow it, and mutants of
/// the former. A generation makes as many children as there are candidates: two parents, each the better of two drawn
/// at random, give every layer's count at random; then budget moves between random layers, and what is over or missing
/// is made up. The best of parents and children go on. The source does not give its operators in full; these are ours.
///
/// [`Allocation::predicted`] is the fitness of the result, as a number to be small; [`Allocation::measured`] its mean
/// divergence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evolution {
    /// Seed of everything random.
    pub seed: u64,
    /// Candidates of every generation.
    pub population: usize,
    /// Number of generations.
    pub generations: usize,
    /// Largest part of a layer, in (0, 1], that one mutation moves.
    pub mutation: f64,
    /// What is optimized.
    pub fitness: Fitness,
    /// What has a count.
    pub within: Within,
}

/// What makes a candidate fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// A large [`Distortion::overlap`], as in the source.
    #[default]
    Overlap,
    /// A small [`Distortion::mean`].
    Mean,
    /// A small [`Distortion::worst`].
    Worst,
}

impl Fitness {
    /// Smaller is fitter.
    fn of(self, distortion: &Distortion) -> f64 {
        match self {
            Self::Overlap => 1.0 - distortion.overlap,
            Self::Mean => distortion.mean,
            Self::Worst => distortion.worst,
        }
    }
}

impl Default for Evolution {
    /// 16 candidates, 20 generations, mutations of up to an eighth of a layer, overlap, seed 0.
    fn default() -> Self {
        Self {
            seed: 0,
            population: 16,
            generations: 20,
            mutation: 0.125,
            fitness: Fitness::default(),
            within: Within::default(),
        }
    }
}

/// How far every path is walked.
type Genes = Vec<usize>;

impl Allocator for Evolution {
    fn recipe(&self) -> Value {
        tagged("evolution", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        Needs::new(granularity, self.within.pool()).asking(Questions { distortion: true, ..Questions::NONE })
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        let invalid = |field, found: String, expected: &str| {
            Err(Error::InvalidParameter { field, found, expected: expected.into() })
        };
        if self.population < 2 {
            return invalid("population", self.population.to_string(), "at least 2");
        }
        if !(self.mutation > 0.0 && self.mutation <= 1.0) {
            return invalid("mutation", self.mutation.to_string(), "a number in (0, 1]");
        }
        request.validate(&self.needs(request.granularity()), probe)?;
        let problem = Problem::new(request, self.within)?;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut known: BTreeMap<Genes, (f64, f64)> = BTreeMap::new();
        let mut measure = |genes: &Genes| -> Result<f64> {
            if let Some((fitness, _)) = known.get(genes) {
                return Ok(*fitness);
            }
            let distortion = probe.distortion(&problem.layers(genes))?;
            let fitness = self.fitness.of(&distortion);
            if !fitness.is_finite() {
                let found = format!("a distortion of {fitness}");
                let expected = "finite distortions".into();
                return Err(Error::InvalidParameter { field: "probe", found, expected });
            }
            known.insert(genes.clone(), (fitness, distortion.mean));
            Ok(fitness)
        };

        let even = spread(&problem, &request.shape.layers.iter().map(|l| l.units() as f64).collect::<Vec<_>>())?;
        let mut genes = vec![even.clone()];
        if request.scores.pool.supports(Pool::Global) {
            genes.extend(ranked(&problem)?);
        }
        while genes.len() < self.population {
            genes.push(self.mutant(&problem, even.clone(), &mut random));
        }
        let mut candidates: Vec<(f64, Genes)> = Vec::new();
        for genes in genes {
            candidates.push((measure(&genes)?, genes));
        }
        fittest(&mut candidates, self.population);
        for _ in 0..self.generations {
            let mut children = Vec::with_capacity(self.population);
            for _ in 0..self.population {
                let mut parent = || {
                    let mut draw = || random.random_range(0..candidates.len());
                    // Fitter ones stand first.
                    &candidates[draw().min(draw())].1
                };
                let (mother, father) = (parent(), parent());
                let child = mother.iter().zip(father).map(|(m, f)| if random.random::<bool>() { *m } else { *f });
                let child = child.collect();
                children.push(self.mutant(&problem, child, &mut random));
            }
            for genes in children {
                candidates.push((measure(&genes)?, genes));
            }
            fittest(&mut candidates, self.population);
        }
        let (fitness, best) = candidates.swap_remove(0);
        let mut allocation = problem.allocation(self.recipe(), &best)?;
        allocation.predicted = Some(fitness);
        allocation.measured = known.get(&best).map(|(_, mean)| *mean);
        allocation.seed = Some(self.seed);
        Ok(allocation)
    }
}

impl Evolution {
    /// Moves budget between layers, up to three times, and meets the budget again.
    fn mutant(&self, problem: &Problem<'_>, mut genes: Genes, random: &mut ChaCha8Rng) -> Genes {
        let paths = &problem.paths;
        if paths.is_empty() {
            return genes;
        }
        for _ in 0..random.random_range(1..=3) {
            let (from, to) = (random.random_range(0..paths.len()), random.random_range(0..paths.len()));
            let most = ((paths[from].end() as f64 * self.mutation) as usize).max(1);
            let steps = random.random_range(1..=most);
            let before = paths[from].kept(genes[from]);
            genes[from] = (genes[from] + steps).min(paths[from].end());
            let moved = before - paths[from].kept(genes[from]);
            genes[to] = genes[to].min(paths[to].position(paths[to].kept(genes[to]) + moved));
        }
        let taste: Vec<f64> = paths.iter().map(|_| random.random()).collect();
        problem.settle(&mut genes, |path, to| taste[path] * (paths[path].units[to] - paths[path].units[to - 1]) as f64);
        genes
    }
}

/// The global ranking as genes.
fn ranked(problem: &Problem<'_>) -> Result<Option<Genes>> {
    let (blocks, _) = compete(problem.request, &problem.queues)?;
    let mut genes: Genes = problem.paths.iter().map(|path| path.position(problem.kept_of(path, &blocks))).collect();
    problem.settle(&mut genes, |path, to| {
        let path = &problem.paths[path];
        path.scores[to] - path.scores[to - 1]
    });
    Ok(Some(genes))
}

/// The first `count`, by fitness, then genes; each once.
fn fittest(candidates: &mut Vec<(f64, Genes)>, count: usize) {
    candidates.sort_by(|a, b| compare(a.0, b.0).then_with(|| a.1.cmp(&b.1)));
    candidates.dedup_by(|a, b| a.1 == b.1);
    candidates.truncate(count);
}
