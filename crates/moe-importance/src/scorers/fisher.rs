//! Fisher importance.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{check_needs, divisor, table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{FISHER_ABS, FISHER_SEQUENCE, FISHER_TOKEN, ROUTED_TOKENS};
use crate::{Result, StatisticId};

/// Which function of the gradients is averaged, and over what. Two published things carry the name Fisher-MoE: the
/// paper names squared gradients, its released code computes mean absolute ones. On the cross-entropy alone, without
/// auxiliary losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// Squared gradients per token with unit-weight token losses, averaged over *all* tokens of the data (predicted or
    /// not, routed or not), so that a rarely routed expert scores low. Exact, and the cheapest:
    /// [`FISHER_TOKEN`].
    #[default]
    Token,
    /// Squared gradients of each sequence's mean loss, averaged over sequences:
    /// [`FisherSequence`](crate::collectors::FisherSequence).
    Sequence,
    /// Absolute gradients of each sequence's mean loss, averaged over the unit's 3H weights and over sequences; the
    /// released reference: [`FisherAbs`](crate::collectors::FisherAbs).
    Abs,
}

/// Fisher importance of units (arXiv 2606.05538): how strongly the loss reacts to a unit's weights. Comparable over the
/// whole model; a never-routed expert scores exactly 0, and the data it did not see still counts in the average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Fisher {
    /// The criterion; default [`Criterion::Token`].
    pub criterion: Criterion,
}

impl Fisher {
    /// With this criterion.
    pub fn new(criterion: Criterion) -> Self {
        Self { criterion }
    }

    fn statistic(&self) -> StatisticId {
        match self.criterion {
            Criterion::Token => FISHER_TOKEN,
            Criterion::Sequence => FISHER_SEQUENCE,
            Criterion::Abs => FISHER_ABS,
        }
    }
}

impl Scorer for Fisher {
    fn name(&self) -> &str {
        "fisher"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::units([self.statistic(), ROUTED_TOKENS]).additive(Pool::Global)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        check_needs(self, statistics)?;
        let (denominator, n) = match self.criterion {
            Criterion::Token => (Denominator::AllTokens, divisor(self, statistics.tokens(), "tokens")?),
            Criterion::Sequence | Criterion::Abs => {
                (Denominator::Sequences, divisor(self, statistics.sequences(), "sequences")?)
            }
        };
        let id = self.statistic();
        table(self, statistics, denominator, |layer, expert, _| {
            Ok(statistics.unit(id.as_str(), layer, expert)?.iter().map(|sum| sum / n).collect())
        })
    }
}
