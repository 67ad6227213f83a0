//! DARE.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use moe_checkpoint::{ExpertId, ExpertPart};

use super::{TaskArithmetic, TaskRule, Ties};
use crate::{Error, Result};

/// Drops each element of each task vector with probability `drop` and divides the others by `1 - drop`, so that the
/// expected change stays; then merges by another rule. Which elements go depends on the seed, the task and the place of
/// the tensor only.
///
/// Source: DARE (arXiv 2311.03099).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dare {
    /// Probability of an element to go, in [0, 1).
    pub drop: f64,
    /// Seed of the draws.
    #[serde(default)]
    pub seed: u64,
    /// How the rescaled task vectors are merged.
    pub then: DareThen,
}

/// How rescaled task vectors are merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DareThen {
    /// The scaled sum.
    TaskArithmetic(TaskArithmetic),
    /// Elected signs; a density of 1 trims nothing more.
    Ties(Ties),
}

impl TaskRule for Dare {
    fn change(&self, expert: ExpertId, part: ExpertPart, mut tasks: Vec<Vec<f32>>) -> Vec<f32> {
        let rescale = (1.0 / (1.0 - self.drop)) as f32;
        for (index, task) in tasks.iter_mut().enumerate() {
            let name = format!("{} {index} {} {} {:?}", self.seed, expert.layer, expert.expert, part);
            let mut rng = ChaCha8Rng::from_seed(*blake3::hash(name.as_bytes()).as_bytes());
            task.iter_mut().for_each(|tau| *tau *= if rng.random::<f64>() < self.drop { 0.0 } else { rescale });
        }
        match &self.then {
            DareThen::TaskArithmetic(rule) => rule.change(expert, part, tasks),
            DareThen::Ties(rule) => rule.change(expert, part, tasks),
        }
    }

    fn validate(&self, tasks: usize) -> Result<()> {
        if !(0.0..1.0).contains(&self.drop) {
            return Err(Error::parameter("rule.drop", self.drop, "a number in [0, 1)"));
        }
        match &self.then {
            DareThen::TaskArithmetic(rule) => rule.validate(tasks),
            DareThen::Ties(rule) => rule.validate(tasks),
        }
    }
}
