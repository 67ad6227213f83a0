//! Scorers: from statistics and weights to scores.

mod activation;
mod config;
mod fisher;
mod magnitude;
mod norms;
mod random;
mod router_score;
mod table;
mod weights;

use moe_checkpoint::{ScoreTable, Statistics};

pub use activation::{Activation, ActivationDenominator};
pub use config::ScorerConfig;
pub use fisher::{Criterion, Fisher};
pub use magnitude::Magnitude;
pub use random::Random;
pub use router_score::{Combine, RouterQuantity, RouterScore};
pub use weights::{ExpertWeightsSource, NoWeights};

use crate::{Result, StatisticId};

/// Turns statistics and expert weights into scores, higher for more important. Pure: the model is not run, and the same
/// input gives the same bits.
///
/// Every scorer of this crate is also a variant of [`ScorerConfig`], which is how recipes name it.
pub trait Scorer: Send + Sync {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// What it is and with which parameters, as one line of JSON; becomes [`ScoreTable::scorer`].
    fn recipe(&self) -> String;

    /// Statistics it reads; none for a scorer that needs no data.
    fn needs(&self) -> Vec<StatisticId>;

    /// Whether it reads expert weights. If not, [`NoWeights`] will do.
    fn reads_weights(&self) -> bool;

    /// Scores of all units, or of all experts.
    ///
    /// A scorer without needs takes empty statistics, `Statistics::new(shape, provenance)`.
    ///
    /// # Errors
    /// [`MissingStatistic`](crate::Error::MissingStatistic), [`NoData`](crate::Error::NoData) for statistics of no
    /// token, [`NonFiniteScore`](crate::Error::NonFiniteScore), weights that cannot be read or are of another model.
    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable>;
}
