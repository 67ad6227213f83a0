//! What a method declares that it needs, so that it can be checked before any work.

use moe_checkpoint::{Granularity, Pool, ScoreTable};

use crate::{Error, Result};

/// What an allocator or a pruner needs of scores and of a model. Declared, so that whatever is missing is an error
/// before the first token of a calibration, not after it.
///
/// ```
/// use moe_checkpoint::{Granularity, Pool};
/// use moe_prune::{ExpertPruner, Needs, NoProbe, Pruner, Questions, SubsetPruner, ModelProbe};
///
/// assert_eq!(ExpertPruner::default().needs(), Needs::new(Granularity::Expert, Pool::Layer));
/// let subset = SubsetPruner::default().needs();
/// assert_eq!(subset.probe, Questions { layer_errors: true, ..Questions::NONE });
/// assert!(subset.check_probe(NoProbe.answers()).is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// What a score has to belong to.
    pub granularity: Granularity,
    /// Over what scores are compared.
    pub pool: Pool,
    /// Sums of scores, the widest of them; `None` where scores are compared and no more.
    pub additive: Option<Sums>,
    /// Whether layers and experts are weighed as wholes ([`WholeScores`](moe_checkpoint::WholeScores)).
    pub wholes: bool,
    /// What a model is asked.
    pub probe: Questions,
}

/// Scores that are added up, or divided by a sum of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sums {
    /// Over what they are added.
    pub over: Pool,
    /// What adds them, for messages: "the normalization by a share of the layer".
    pub what: &'static str,
}

/// Questions about a model, as a method asks them or as a [`ModelProbe`](crate::ModelProbe) answers them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Questions {
    /// [`ModelProbe::distortion`](crate::ModelProbe::distortion).
    pub distortion: bool,
    /// [`ModelProbe::gain_gradient`](crate::ModelProbe::gain_gradient).
    pub gain_gradient: bool,
    /// [`ModelProbe::layer_errors`](crate::ModelProbe::layer_errors) and
    /// [`ModelProbe::settle`](crate::ModelProbe::settle).
    pub layer_errors: bool,
}

impl Questions {
    /// No question: scores are enough.
    pub const NONE: Self = Self { distortion: false, gain_gradient: false, layer_errors: false };

    /// Every question.
    pub const ALL: Self = Self { distortion: true, gain_gradient: true, layer_errors: true };

    /// Whether anything is asked at all.
    pub fn any(self) -> bool {
        self != Self::NONE
    }

    /// What either asks.
    pub fn or(self, other: Self) -> Self {
        Self {
            distortion: self.distortion || other.distortion,
            gain_gradient: self.gain_gradient || other.gain_gradient,
            layer_errors: self.layer_errors || other.layer_errors,
        }
    }
}

impl Needs {
    /// Scores of this granularity, compared over this pool, and nothing else. Whole experts are compared over their
    /// layer at least.
    pub fn new(granularity: Granularity, pool: Pool) -> Self {
        let pool = match granularity {
            Granularity::Unit => pool,
            Granularity::Expert => pool.max(Pool::Layer),
        };
        Self { granularity, pool, additive: None, wholes: false, probe: Questions::NONE }
    }

    /// The same, with scores that `what` adds up over a pool.
    pub fn adding(self, over: Pool, what: &'static str) -> Self {
        let wider = self.additive.filter(|sums| sums.over >= over);
        Self { additive: Some(wider.unwrap_or(Sums { over, what })), ..self }
    }

    /// The same, with weights of layers and experts as wholes beside the scores.
    pub fn weighing_wholes(self) -> Self {
        Self { wholes: true, ..self }
    }

    /// The same, with these questions to a model.
    pub fn asking(self, questions: Questions) -> Self {
        Self { probe: self.probe.or(questions), ..self }
    }

    /// Whether a table supports what is done with its scores. Its values are not looked at.
    ///
    /// # Errors
    /// [`Error::NeedsUnitScores`], [`Error::NeedsExpertScores`], [`Error::PoolTooNarrow`], [`Error::NotAdditive`],
    /// [`Error::NeedsWholes`].
    pub fn check_scores(&self, scores: &ScoreTable) -> Result<()> {
        match (self.granularity, scores.granularity) {
            (Granularity::Unit, Granularity::Expert) => return Err(Error::NeedsUnitScores),
            (Granularity::Expert, Granularity::Unit) => return Err(Error::NeedsExpertScores),
            _ => {}
        }
        if !scores.pool.supports(self.pool) {
            return Err(Error::PoolTooNarrow { wanted: self.pool, supported: scores.pool });
        }
        if self.wholes && scores.layers.iter().any(|layer| layer.whole.is_none()) {
            return Err(Error::NeedsWholes { scorer: scores.scorer.clone() });
        }
        match self.additive.filter(|sums| !scores.adds_up(sums.over)) {
            Some(Sums { over, what }) => Err(Error::NotAdditive { what, wanted: over, supported: scores.additive }),
            None => Ok(()),
        }
    }

    /// Whether a probe with these answers can be asked everything.
    ///
    /// # Errors
    /// [`Error::NeedsProbe`] names the first question that nobody answers.
    pub fn check_probe(&self, answers: Questions) -> Result<()> {
        let questions = [
            (self.probe.distortion, answers.distortion, "the distortion of a plan"),
            (self.probe.gain_gradient, answers.gain_gradient, "the gradient of expert gains"),
            (self.probe.layer_errors, answers.layer_errors, "the output error of a layer"),
        ];
        match questions.into_iter().find(|(asked, answered, _)| *asked && !answered) {
            Some((_, _, what)) => Err(Error::NeedsProbe { what }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_question_without_an_answer_is_named() {
        let needs = Needs::new(Granularity::Unit, Pool::Expert).asking(Questions::ALL);
        let answers = Questions { distortion: true, ..Questions::NONE };
        let error = needs.check_probe(answers).unwrap_err().to_string();
        assert!(error.contains("gradient of expert gains"), "{error}");
        needs.check_probe(Questions::ALL).unwrap();
    }

    #[test]
    fn whole_experts_are_compared_over_their_layer() {
        assert_eq!(Needs::new(Granularity::Expert, Pool::Expert).pool, Pool::Layer);
        assert_eq!(Needs::new(Granularity::Unit, Pool::Expert).pool, Pool::Expert);
        let sums =
            Needs::new(Granularity::Unit, Pool::Layer).adding(Pool::Layer, "wide").adding(Pool::Expert, "narrow");
        assert_eq!(sums.additive, Some(Sums { over: Pool::Layer, what: "wide" }));
    }
}
