//! ESFT's task relevance of experts.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{ROUTED_TOKENS, ROUTING_GATE};
use crate::{Result, StatisticId};

/// How an expert's use is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EsftScore {
    /// Share of the selections, `selected / (tokens * k)`; sums to 1 over a layer. The paper trains experts up to a sum
    /// of 0.2.
    #[default]
    Token,
    /// Mean gate over the tokens, 0 where the expert is not selected: the routing weight before the factor that all
    /// weights of a model carry (`routed_scaling_factor`). Not rescaled: the scores of a layer sum to what the gates of
    /// a token sum to, which is how the published adapters came about. The paper trains experts up to a sum of 0.1.
    Gate,
}

/// Use of an expert by a task, by which expert-specialized fine-tuning (arXiv 2407.01906) selects what it trains: in
/// each layer, experts are taken from the most used on until their scores sum to a threshold.
///
/// The released script divides by sums over layers, which does not reproduce the published selections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Esft {
    /// Token or gate score; default [`EsftScore::Token`].
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
            EsftScore::Gate => ROUTING_GATE,
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
        let tokens = divisor(self, statistics.tokens(), "tokens")?;
        let denominator = match self.score {
            EsftScore::Token => Denominator::None,
            EsftScore::Gate => Denominator::AllTokens,
        };
        expert_table(self, statistics, denominator, |layer, expert| {
            let values = statistics.expert(self.statistic().as_str(), layer)?;
            let selections = values.iter().sum::<f64>().max(1.0);
            Ok(values[expert] / if self.score == EsftScore::Gate { tokens } else { selections })
        })
    }
}
