//! Bias accumulation.

use moe_checkpoint::{Denominator, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{BIAS_SEQUENCE_MEAN, BIAS_SEQUENCE_MEDIAN, BIAS_WAVE_MEAN, BIAS_WAVE_MEDIAN, ROUTED_TOKENS};
use crate::{Error, Result, StatisticId};

/// What votes once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sample {
    /// A wave, as a batch would.
    Wave,
    /// A sequence.
    #[default]
    Sequence,
}

/// What the usage of an expert is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Around {
    /// The mean usage of the layer's experts.
    #[default]
    Mean,
    /// The median usage.
    Median,
}

/// The bias that usage would accumulate: `step * sum over samples of sign(u_e - middle of u)`, with the usage u_e an
/// expert's softmax probability over all experts, summed over the tokens of a sample.
///
/// ExpertCondenser (arXiv 2604.23036) and the expert-drop baseline of Less-is-MoE add the bias to the logits of the
/// next batch; here it is *not* fed back into the softmax, so that samples are independent and shards can be added.
/// Without feedback a clip of the bias would only flatten the largest scores, so there is none. [`Around::Median`] of
/// an even number of experts is the mean of the middle two.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Bias {
    /// How much a sample moves a bias, above 0; default 0.001.
    pub step: f64,
    /// What votes; default [`Sample::Sequence`]: as many votes as the data has, however it is cut into waves.
    pub sample: Sample,
    /// What usage is compared with; default [`Around::Mean`].
    pub around: Around,
}

impl Default for Bias {
    fn default() -> Self {
        Self::new(1e-3, Sample::default(), Around::default())
    }
}

impl Bias {
    /// With these parameters; [`Scorer::validate`] checks the step.
    pub fn new(step: f64, sample: Sample, around: Around) -> Self {
        Self { step, sample, around }
    }

    fn statistic(&self) -> StatisticId {
        match (self.sample, self.around) {
            (Sample::Wave, Around::Mean) => BIAS_WAVE_MEAN,
            (Sample::Wave, Around::Median) => BIAS_WAVE_MEDIAN,
            (Sample::Sequence, Around::Mean) => BIAS_SEQUENCE_MEAN,
            (Sample::Sequence, Around::Median) => BIAS_SEQUENCE_MEDIAN,
        }
    }
}

impl Scorer for Bias {
    fn name(&self) -> &str {
        "bias"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([self.statistic(), ROUTED_TOKENS]).within(Pool::Layer)
    }

    fn validate(&self) -> Result<()> {
        if self.step.is_finite() && self.step > 0.0 {
            return Ok(());
        }
        Err(Error::InvalidField {
            scorer: self.name().into(),
            field: "step".into(),
            reason: format!("found {}, expected a number above 0", self.step),
        })
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        self.validate()?;
        divisor(self, statistics.tokens(), "tokens")?;
        expert_table(self, statistics, Denominator::None, |layer, expert| {
            Ok(self.step * statistics.expert(self.statistic().as_str(), layer)?[expert])
        })
    }
}
