//! Fisher importance.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{check_needs, divisor, table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{
    FISHER_ABS, FISHER_ABS_DOWN, FISHER_ABS_GATE, FISHER_ABS_UP, FISHER_SEQUENCE, FISHER_TOKEN, ROUTED_TOKENS,
};
use crate::{Error, Result, StatisticId};

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

/// A matrix of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The gate projection.
    Gate,
    /// The up projection.
    Up,
    /// The down projection.
    Down,
}

/// Some of the matrices of an expert. As JSON a list: `["gate", "up"]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<Part>", into = "Vec<Part>")]
pub struct Parts {
    gate: bool,
    up: bool,
    down: bool,
}

impl Parts {
    /// All three.
    pub const ALL: Self = Self { gate: true, up: true, down: true };

    /// These, in order.
    pub fn list(self) -> Vec<Part> {
        let all = [(self.gate, Part::Gate), (self.up, Part::Up), (self.down, Part::Down)];
        all.into_iter().filter_map(|(there, part)| there.then_some(part)).collect()
    }

    fn all(&self) -> bool {
        *self == Self::ALL
    }
}

impl Default for Parts {
    fn default() -> Self {
        Self::ALL
    }
}

impl From<Vec<Part>> for Parts {
    fn from(parts: Vec<Part>) -> Self {
        let has = |part| parts.contains(&part);
        Self { gate: has(Part::Gate), up: has(Part::Up), down: has(Part::Down) }
    }
}

impl From<Parts> for Vec<Part> {
    fn from(parts: Parts) -> Self {
        parts.list()
    }
}

/// Fisher importance of units (arXiv 2606.05538): how strongly the loss reacts to a unit's weights. Comparable over the
/// whole model; a never-routed expert scores exactly 0, and the data it did not see still counts in the average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Fisher {
    /// The criterion; default [`Criterion::Token`].
    pub criterion: Criterion,
    /// Of which matrices the gradients count; default all. Some of them, for [`Criterion::Abs`] alone, are a baseline
    /// of the released code: the mean is over their weights. With the mean of [`Experts`](super::Experts) it is the
    /// published one of whole experts.
    #[serde(skip_serializing_if = "Parts::all")]
    pub parts: Parts,
}

impl Fisher {
    /// With this criterion.
    pub fn new(criterion: Criterion) -> Self {
        Self { criterion, parts: Parts::ALL }
    }

    /// With gradients of some matrices, of [`Criterion::Abs`].
    pub fn of_parts(parts: impl Into<Parts>) -> Self {
        Self { criterion: Criterion::Abs, parts: parts.into() }
    }

    /// What the mean is taken of.
    fn statistics(&self) -> Vec<StatisticId> {
        let of_part = |part| match part {
            Part::Gate => FISHER_ABS_GATE,
            Part::Up => FISHER_ABS_UP,
            Part::Down => FISHER_ABS_DOWN,
        };
        match self.criterion {
            Criterion::Token => vec![FISHER_TOKEN],
            Criterion::Sequence => vec![FISHER_SEQUENCE],
            Criterion::Abs if self.parts.all() => vec![FISHER_ABS],
            Criterion::Abs => self.parts.list().into_iter().map(of_part).collect(),
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
        Needs::units(self.statistics().into_iter().chain([ROUTED_TOKENS])).additive(Pool::Global)
    }

    fn validate(&self) -> Result<()> {
        let reason = match (self.criterion, self.parts.list().len()) {
            (_, 0) => "found none, expected some of `gate`, `up`, `down`".to_string(),
            (Criterion::Token | Criterion::Sequence, 1 | 2) => {
                format!("found {:?}, expected all: only criterion `abs` is of single matrices", self.parts.list())
            }
            _ => return Ok(()),
        };
        Err(Error::InvalidField { scorer: self.name().into(), field: "parts".into(), reason })
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        self.validate()?;
        check_needs(self, statistics)?;
        let (denominator, n) = match self.criterion {
            Criterion::Token => (Denominator::AllTokens, divisor(self, statistics.tokens(), "tokens")?),
            Criterion::Sequence | Criterion::Abs => {
                (Denominator::Sequences, divisor(self, statistics.sequences(), "sequences")?)
            }
        };
        let ids = self.statistics();
        let n = n * ids.len() as f64;
        table(self, statistics, denominator, |layer, expert, width| {
            let mut scores = vec![0.0; width];
            for id in &ids {
                let sums = statistics.unit(id.as_str(), layer, expert)?;
                scores.iter_mut().zip(sums).for_each(|(score, sum)| *score += sum / n);
            }
            Ok(scores)
        })
    }
}
