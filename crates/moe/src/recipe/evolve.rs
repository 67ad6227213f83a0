//! The step that searches for experts by running the model.

use moe_checkpoint::Mtp;
use moe_merge::{ExpertEvolution, Fitness};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Prunes experts, then puts parts of the others into those that stay, by a gradient-free search on the rows of
/// calibration (EEP, arXiv 2407.00945). Stock loaders read the outcome. The matrices are an artifact of the run,
/// `steps/evolve-…/map.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Evolve {
    /// Experts that every layer keeps.
    pub experts: usize,
    /// Candidates of every generation; default 16.
    #[serde(default = "population")]
    pub population: usize,
    /// Generations of the search for sets of experts; default 20.
    #[serde(default = "generations")]
    pub pruning: usize,
    /// Generations of the search for matrices; default 20, 0 prunes and no more.
    #[serde(default = "generations")]
    pub merging: usize,
    /// Standard deviation of the steps of entries of matrices; default 0.1.
    #[serde(default = "mutation")]
    pub mutation: f64,
    /// What is made small: `loss` over the tokens that count, or `divergence` from the full model.
    #[serde(default)]
    #[schemars(with = "String")]
    pub fitness: Fitness,
    /// What becomes of layers that predict further tokens, where a model has them.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub mtp: Option<Mtp>,
}

fn population() -> usize {
    ExpertEvolution::default().population
}

fn generations() -> usize {
    ExpertEvolution::default().merging
}

fn mutation() -> f64 {
    ExpertEvolution::default().mutation
}

impl Evolve {
    /// The search, with the seed of a run.
    pub fn search(&self, seed: u64) -> ExpertEvolution {
        let Self { experts, population, pruning, merging, mutation, fitness, .. } = *self;
        ExpertEvolution { experts, population, pruning, merging, mutation, fitness, seed }
    }
}
