//! ESFT's task relevance of experts.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{ROUTED_TOKENS, ROUTING_WEIGHT};
use crate::{Result, StatisticId};

/// What is shared out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EsftScore {
    /// Selections: their share is the number of tokens routed to the expert over tokens times top-k.
    Token,
    /// Routing weights as the model applies them.
    #[default]
    Gate,
}

/// Share of an expert in the routing of its layer, by which expert-specialised fine-tuning (arXiv 2407.01906) selects what it
/// trains: scores of a layer sum to 1, and experts are taken from the largest on until the sum reaches p.
///
/// The released script divides by the sum over layers instead, which its own selection does not need; this is the share within
/// the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Esft {
    /// Token or gate score; default [`EsftScore::Gate`].
    pub score: EsftScore,
}

impl Esft {
    /// With this score.
    pub fn new(score: EsftScore) -> Self {
        Self { score }
    }

    fn statistic(&self) -> StatisticId {
        match self.score {
            EsftScore::Token => ROUTED_TOKENS,
            EsftScore::Gate => ROUTING_WEIGHT,
        }
    }
}

impl Scorer for Esft {
    fn name(&self) -> &str {
        "esft"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS]).within(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        divisor(self, statistics.tokens(), "tokens")?;
        expert_table(self, statistics, Denominator::None, |layer, expert| {
            let values = statistics.expert(self.statistic().as_str(), layer)?;
            let total: f64 = values.iter().sum();
            // Routing weights can all be zero; then nobody has a share.
            Ok(if total > 0.0 { values[expert] / total } else { 0.0 })
        })
    }
}
