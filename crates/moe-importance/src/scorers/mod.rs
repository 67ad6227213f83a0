//! Scorers: from statistics and weights to scores.

mod activation;
mod aimer;
mod average;
mod bias;
mod config;
mod coupled;
mod dern;
mod ean;
mod esft;
mod expert_magnitude;
mod experts;
mod fisher;
mod frequency;
mod heapr;
mod magnitude;
mod man;
mod mone;
mod norms;
mod projection;
mod random;
mod reap;
mod router_score;
mod router_taylor;
mod routing_weight;
mod seer;
mod table;
mod taylor;
mod tenp;
mod units;
mod weights;

use moe_checkpoint::{Granularity, ScoreTable, Statistics};

pub use activation::Activation;
pub use aimer::Aimer;
pub use average::{Average, Weighting};
pub use bias::{Around, Bias, Sample};
pub use config::ScorerConfig;
pub use coupled::Coupled;
pub use dern::Dern;
pub use ean::Ean;
pub use esft::{Esft, EsftScore};
pub use expert_magnitude::ExpertMagnitude;
pub use experts::Experts;
pub use fisher::{Criterion, Fisher};
pub use frequency::Frequency;
pub use heapr::Heapr;
pub use magnitude::Magnitude;
pub use man::Man;
pub use mone::Mone;
pub use projection::Projection;
pub use random::Random;
pub use reap::Reap;
pub use router_score::{RouterQuantity, RouterScore};
pub use router_taylor::{RouterForm, RouterTaylor};
pub use routing_weight::RoutingWeight;
pub use seer::{Seer, SeerCount};
pub use taylor::{Taylor, TaylorForm};
pub use tenp::Tenp;
pub use units::{Combine, Units};
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

    /// Whether it scores units or experts.
    fn granularity(&self) -> Granularity;

    /// Checks its parameters.
    ///
    /// # Errors
    /// [`Error::InvalidField`](crate::Error::InvalidField) names the parameter, what was found and what was expected.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Statistics it reads; none for a scorer that needs no data.
    fn needs(&self) -> Vec<StatisticId>;

    /// Whether it reads weights of experts or routers. If not, [`NoWeights`] will do.
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
