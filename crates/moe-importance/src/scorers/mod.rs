//! Scorers: from statistics and weights to scores.

mod activation;
mod aimer;
mod attribution;
mod average;
mod bias;
mod channel_norms;
mod coalition;
mod config;
mod coupled;
mod dern;
mod ean;
mod esft;
mod expert_magnitude;
mod experts;
mod fisher;
mod frequency;
mod gate;
mod heapr;
mod magnitude;
mod man;
mod mone;
mod needs;
mod norms;
mod projection;
mod random;
mod reap;
mod router_score;
mod router_taylor;
mod routing_weight;
mod seer;
mod slimming;
mod table;
mod taylor;
mod tenp;
mod units;
mod weights;

use moe_checkpoint::{ScoreTable, Statistics};
use serde_json::Value;

pub use activation::Activation;
pub use aimer::Aimer;
pub use attribution::{Attribution, Order};
pub use average::{Average, Weighting};
pub use bias::{Around, Bias, Sample};
pub use channel_norms::ChannelNorms;
pub use coalition::Coalition;
pub use config::ScorerConfig;
pub use coupled::Coupled;
pub use dern::Dern;
pub use ean::Ean;
pub use esft::{Esft, EsftScore};
pub use expert_magnitude::ExpertMagnitude;
pub use experts::Experts;
pub use fisher::{Criterion, Fisher, Part, Parts};
pub use frequency::Frequency;
pub use gate::Gate;
pub use heapr::Heapr;
pub use magnitude::Magnitude;
pub use man::Man;
pub use mone::Mone;
pub use needs::Needs;
pub use projection::Projection;
pub use random::Random;
pub use reap::Reap;
pub use router_score::{RouterQuantity, RouterScore};
pub use router_taylor::{RouterForm, RouterTaylor};
pub use routing_weight::RoutingWeight;
pub use seer::{Seer, SeerCount};
pub use slimming::Slimming;
pub use table::{check_needs, table};
pub use taylor::{Taylor, TaylorForm};
pub use tenp::Tenp;
pub use units::{Combine, Units};
pub use weights::{ExpertWeightsSource, NoWeights};

use crate::Result;

/// Turns statistics and expert weights into scores, higher for more important. Pure: the model is not run, and the same
/// input gives the same bits.
///
/// A program can have scorers of its own: [`Collection::for_scorers`](crate::Collection::for_scorers) collects what
/// they need, every pruner takes their tables, and plans record their recipe. The scorers of this crate are also
/// variants of [`ScorerConfig`], which is how recipes name them.
///
/// ```
/// use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
/// use moe_importance::scorers::{check_needs, table};
/// use moe_importance::statistics::{OUTPUT_MAX, OUTPUT_NORM};
/// use moe_importance::{ExpertWeightsSource, Needs, Scorer};
///
/// /// The largest output beside the sum of all: experts that are silent but for one token.
/// struct Spiky;
///
/// impl Scorer for Spiky {
///     fn name(&self) -> &str {
///         "spiky"
///     }
///     fn recipe(&self) -> serde_json::Value {
///         serde_json::json!({ "type": "spiky" })
///     }
///     fn needs(&self) -> Needs {
///         Needs::experts([OUTPUT_MAX, OUTPUT_NORM]).within(Pool::Layer)
///     }
///     fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> moe_importance::Result<ScoreTable> {
///         check_needs(self, statistics)?;
///         table(self, statistics, Denominator::None, |layer, expert, _| {
///             let [max, norm] = [OUTPUT_MAX, OUTPUT_NORM].map(|id| statistics.expert(id.as_str(), layer));
///             Ok(vec![max?[expert] / (1.0 + norm?[expert])])
///         })
///     }
/// }
/// ```
pub trait Scorer: Send + Sync {
    /// Its name in recipes and messages.
    fn name(&self) -> &str;

    /// What it is and with which parameters, as JSON; its text becomes [`ScoreTable::scorer`].
    fn recipe(&self) -> Value;

    /// Checks its parameters.
    ///
    /// # Errors
    /// [`Error::InvalidField`](crate::Error::InvalidField) names the parameter, what was found and what was expected.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// What it reads, and what its scores are good for.
    fn needs(&self) -> Needs;

    /// Scores of all units, or of all experts.
    ///
    /// A scorer without needs takes empty statistics, `Statistics::new(shape, provenance)`.
    ///
    /// # Errors
    /// [`MissingStatistic`](crate::Error::MissingStatistic), [`NoData`](crate::Error::NoData) for statistics of no
    /// token, [`NonFiniteScore`](crate::Error::NonFiniteScore), weights that cannot be read or are of another model.
    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable>;
}
