//! Random scores, the control.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::table;
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::Result;

/// Uniform in `[0, 1)`: the control that every comparison needs. A unit's score depends on the seed, its layer, expert
/// and index alone, and is the same on every machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Random {
    /// The seed; default 0.
    pub seed: u64,
}

impl Random {
    /// With this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }
}

impl Scorer for Random {
    fn name(&self) -> &str {
        "random"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([]).additive(Pool::Global)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        table(self, statistics, Denominator::None, |layer, expert, width| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            // One stream per expert: no order of experts, layers or threads is involved.
            rng.set_stream(((layer as u64) << 32) | expert as u64);
            // 24 random bits are exact in f32.
            Ok((0..width).map(|_| f64::from(rng.next_u32() >> 8) / f64::from(1 << 24)).collect())
        })
    }
}
