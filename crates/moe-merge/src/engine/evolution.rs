//! Evolving which experts stay, and then what of the others goes into them.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Mtp};
use moe_core::data::Wave;
use moe_core::trace::Nobody;
use moe_core::{CrossEntropy, Distillation, Engine, EngineOptions, Model, Objective, TeacherLogits};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::expert_map::{ExpertMap, LayerMap};
use crate::merged::not_grouped;
use crate::{Error, Result};

/// Likeliest tokens of the full model that divergences are of.
const TEACHER_TOKENS: usize = 256;

/// EEP (arXiv 2407.00945): a gradient-free search for the experts that stay and for what they are made of, by running
/// the model. Nothing but inference is needed.
///
/// - **Pruning.** Candidates are sets of experts, one per layer. A child takes every layer from one of two parents;
///   then one expert of a layer changes places with one that went.
/// - **Merging.** From the best of these on, candidates are an [`ExpertMap`]: the router mapping and expert merging
///   matrices of every layer, with any entries. A child takes every layer from one of two parents or the mean of both;
///   then entries of a row of either matrix of one layer move by a normal step of size [`mutation`](Self::mutation).
///
/// The best of parents and children go on. The fitness of the source is the score of a task on a few rows; here it is
/// the loss over the tokens that count in them, or the divergence from the full model. A candidate costs a forward
/// sweep. The source does not give its operators and sizes in full: these are ours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertEvolution {
    /// Experts that every layer keeps, r.
    pub experts: usize,
    /// Candidates of every generation, at least 2.
    pub population: usize,
    /// Generations of the search for sets.
    pub pruning: usize,
    /// Generations of the search for matrices; 0 prunes and no more.
    pub merging: usize,
    /// Standard deviation of the steps of entries.
    pub mutation: f64,
    /// What is made small.
    pub fitness: Fitness,
    /// Seed of everything random.
    pub seed: u64,
}

/// What an evolution makes small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// Mean loss over the tokens that count: the task of the rows. A pruned model may be better at it than the full
    /// one.
    #[default]
    Loss,
    /// Mean divergence from the full model.
    Divergence,
}

impl Default for ExpertEvolution {
    /// 8 experts; 16 candidates, 20 generations each, steps of 0.1, the loss, seed 0.
    fn default() -> Self {
        Self {
            experts: 8,
            population: 16,
            pruning: 20,
            merging: 20,
            mutation: 0.1,
            fitness: Fitness::default(),
            seed: 0,
        }
    }
}

/// What an evolution found.
#[derive(Clone, Debug, PartialEq)]
pub struct Evolved {
    /// The best matrices.
    pub map: ExpertMap,
    /// The least loss or divergence after the first candidates, and after every generation.
    pub best: Vec<f64>,
    /// Models that were run.
    pub runs: usize,
}

/// A candidate and its fitness, a number to be small.
type Ranked = (f64, Vec<LayerMap>);

impl ExpertEvolution {
    /// Checks the parameters, by themselves and on a model.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`]; [`Error::Infeasible`] for a model whose experts share weights.
    pub fn check(&self, base: &Checkpoint) -> Result<()> {
        if self.population < 2 {
            return Err(Error::parameter("population", self.population, "at least 2"));
        }
        if !(self.mutation > 0.0 && self.mutation.is_finite()) {
            return Err(Error::parameter("mutation", self.mutation, "a finite number above 0"));
        }
        not_grouped(base)?;
        let routing = &base.config().routing;
        if routing.groups().is_some() {
            let expected = "a router that selects experts and no groups of them";
            return Err(Error::parameter("experts", "a router that selects groups of experts first", expected));
        }
        let fewest = base.shape().layers.iter().map(|layer| layer.num_experts()).min().unwrap_or(0);
        match (routing.top_k.max(1)..=fewest).contains(&self.experts) {
            true => Ok(()),
            false => {
                let expected = format!("{} (experts per token) to {fewest}", routing.top_k.max(1));
                Err(Error::parameter("experts", self.experts, expected))
            }
        }
    }

    /// Searches. `tell` is told how many models were run, of how many at most.
    ///
    /// # Errors
    /// As [`ExpertEvolution::check`]; whatever stops the model.
    pub fn search(
        &self,
        model: &Model,
        waves: &[Wave],
        mtp: Option<Mtp>,
        tell: &mut dyn FnMut(usize, usize),
    ) -> Result<Evolved> {
        let base = model.checkpoint().clone();
        self.check(&base)?;
        let teacher = match self.fitness {
            Fitness::Loss => None,
            Fitness::Divergence => {
                let engine = Engine::new(model, EngineOptions::default());
                let tokens = TEACHER_TOKENS.min(model.config().vocab_size);
                Some(TeacherLogits::record(&engine, waves, tokens)?)
            }
        };
        let (mut runs, all) = (0, self.population * (1 + self.pruning + self.merging));
        let mut measure = |layers: Vec<LayerMap>| -> Result<Ranked> {
            runs += 1;
            let fitness = measured(model, &base, &layers, waves, teacher.as_ref(), mtp)?;
            tell(runs, all);
            Ok((fitness, layers))
        };
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut ranked: Vec<Ranked> = Vec::new();
        for _ in 0..self.population {
            ranked.push(measure(self.drawn(&base, &mut random))?);
        }
        let mut best = Vec::with_capacity(1 + self.pruning + self.merging);
        self.fittest(&mut ranked, &mut best);
        for generation in 0..self.pruning + self.merging {
            let merging = generation >= self.pruning;
            for _ in 0..self.population {
                let parents = [(); 2].map(|()| {
                    // Fitter ones stand first: the better of two drawn at random.
                    let mut draw = || random.random_range(0..ranked.len().min(self.population));
                    draw().min(draw())
                });
                let [mother, father] = parents.map(|at| ranked[at].1.as_slice());
                let mut child = crossed(mother, father, merging, &mut random);
                match merging {
                    false => swap(&mut child, &base, &mut random),
                    true => self.step(&mut child, &mut random),
                }
                ranked.push(measure(child)?);
            }
            self.fittest(&mut ranked, &mut best);
        }
        let map = ExpertMap::new(&base, ranked.swap_remove(0).1)?;
        Ok(Evolved { map, best, runs })
    }

    /// Sets drawn at random.
    fn drawn(&self, base: &Checkpoint, random: &mut ChaCha8Rng) -> Vec<LayerMap> {
        let mut layer = |shape: &moe_checkpoint::MoeLayerShape| {
            let mut all: Vec<u32> = (0..shape.num_experts() as u32).collect();
            let (kept, _) = all.partial_shuffle(random, self.experts);
            kept.sort_unstable();
            LayerMap::keep(shape.layer, kept, shape.num_experts())
        };
        base.shape().layers.iter().map(&mut layer).collect()
    }

    fn fittest(&self, ranked: &mut Vec<Ranked>, best: &mut Vec<f64>) {
        // Stable: of equals the older one stays.
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        ranked.dedup_by(|a, b| a.1 == b.1);
        ranked.truncate(self.population);
        best.extend(ranked.first().map(|(fitness, _)| *fitness));
    }

    /// Moves entries of one row of both matrices of a layer.
    fn step(&self, layers: &mut [LayerMap], random: &mut ChaCha8Rng) {
        let at = random.random_range(0..layers.len());
        let layer = &mut layers[at];
        let row = random.random_range(0..layer.kept.len());
        for matrix in [&mut layer.router, &mut layer.experts] {
            for value in &mut matrix[row] {
                // A quarter of the entries, so that most experts stay sums of few.
                if random.random_bool(0.25) {
                    *value += (self.mutation * normal(random)) as f32;
                }
            }
        }
    }
}

/// A number of the standard normal distribution (Box-Muller).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let (radius, turn): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}

/// A child whose layers are those of either parent or, where matrices are mixed and keep the same experts, their mean.
fn crossed(mother: &[LayerMap], father: &[LayerMap], merging: bool, random: &mut ChaCha8Rng) -> Vec<LayerMap> {
    let layer = |(mother, father): (&LayerMap, &LayerMap)| match random.random_range(0..if merging { 3 } else { 2 }) {
        0 => mother.clone(),
        2 if mother.kept == father.kept => {
            let mean = |a: &[Vec<f32>], b: &[Vec<f32>]| -> Vec<Vec<f32>> {
                let row = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)).collect();
                a.iter().zip(b).map(row).collect()
            };
            LayerMap {
                router: mean(&mother.router, &father.router),
                experts: mean(&mother.experts, &father.experts),
                ..mother.clone()
            }
        }
        _ => father.clone(),
    };
    mother.iter().zip(father).map(layer).collect()
}

/// Gives the place of one expert of a layer to one that went.
fn swap(layers: &mut [LayerMap], base: &Checkpoint, random: &mut ChaCha8Rng) {
    let at = random.random_range(0..layers.len());
    let experts = base.shape().layers[at].num_experts();
    let mut kept = layers[at].kept.clone();
    let gone: Vec<u32> = (0..experts as u32).filter(|expert| kept.binary_search(expert).is_err()).collect();
    if gone.is_empty() {
        return;
    }
    let (out, into) = (random.random_range(0..kept.len()), random.random_range(0..gone.len()));
    kept[out] = gone[into];
    kept.sort_unstable();
    layers[at] = LayerMap::keep(layers[at].layer, &kept, experts);
}

/// Loss or divergence of a candidate per token.
fn measured(
    model: &Model,
    base: &Arc<Checkpoint>,
    layers: &[LayerMap],
    waves: &[Wave],
    teacher: Option<&TeacherLogits>,
    mtp: Option<Mtp>,
) -> Result<f64> {
    let candidate = ExpertMap::new(base, layers.to_vec())?.on(base, mtp)?;
    let candidate = model.like(candidate)?;
    let engine = Engine::new(&candidate, EngineOptions::default());
    let (mut sum, mut tokens) = (0.0, 0);
    for wave in waves {
        let mut distillation = teacher.map(Distillation::new);
        let objective: &mut dyn Objective = match &mut distillation {
            Some(distillation) => distillation,
            None => &mut CrossEntropy,
        };
        let report = engine.run_with(wave, objective, &mut Nobody)?;
        sum += report.loss.unwrap_or(0.0);
        tokens += report.loss_tokens;
    }
    match tokens {
        0 => Err(Error::parameter("waves", "no token that counts", "at least one")),
        // What breaks a model is unfit, and no reason to stop.
        _ if !sum.is_finite() => Ok(f64::INFINITY),
        _ => Ok(sum / tokens as f64),
    }
}
