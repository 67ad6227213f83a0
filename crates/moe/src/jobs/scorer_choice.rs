//! Which of several scorers to prune by, measured.

use moe_checkpoint::{Mtp, ProtectionMask, ScoreTable};
use moe_core::data::{Dataset, Sequence, WaveOptions, waves};
use moe_core::evaluate::divergence;
use moe_core::{Engine, EngineOptions, Model, TeacherLogits};
use moe_importance::{Calibration, Scorer, ScorerConfig};
use moe_prune::{Budget, NoProbe, PruneForm, PruneOptions, PruneRequest, Pruner, Questions};
use serde::{Deserialize, Serialize};

use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// Every so many sequences one is held back from the scores, to compare on.
const HELD_BACK: usize = 3;
/// Likeliest tokens per position that divergences are of.
const TEACHER_TOKENS: usize = 256;

/// A choice among scorers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScorerChoice {
    /// Position of the one that was chosen.
    pub best: usize,
    /// All of them, in the order given.
    pub tried: Vec<TriedScorer>,
}

/// A scorer that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriedScorer {
    /// What it is called.
    pub scorer: String,
    /// Divergence from the full model on what was held back, in nats per predicted token; none where the pruner cannot
    /// use its scores.
    pub divergence: Option<f64>,
    /// Why the pruner cannot use them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl ScorerChoice {
    /// The name of the one that was chosen.
    pub fn name(&self) -> &str {
        &self.tried[self.best].scorer
    }

    /// How it was chosen: the divergence of every scorer, the least first.
    pub fn why(&self) -> String {
        let mut tried: Vec<&TriedScorer> = self.tried.iter().collect();
        tried.sort_by(|a, b| a.divergence.unwrap_or(f64::INFINITY).total_cmp(&b.divergence.unwrap_or(f64::INFINITY)));
        let told = tried.iter().map(|tried| match tried.divergence {
            Some(nats) => format!("{} {nats:.4}", tried.scorer),
            None => format!("{} impossible", tried.scorer),
        });
        format!("scores by {} (chosen by divergence in nats: {})", self.name(), told.collect::<Vec<_>>().join(", "))
    }
}

/// Chooses the scorer whose model stays closest to the full one: every third sequence is held back, the others are
/// scored in one pass for all scorers, `pruner` prunes by each, and divergences are of what was held back. Ties go to
/// the first.
///
/// # Errors
/// [`Error::Usage`] for no scorer, or a pruner that asks the running model; [`Error::Invalid`] for fewer than three
/// sequences, and where the pruner cannot use any of the scores, with the reason of each; whatever stops the model.
pub fn choose_scorer(
    model: &Model,
    scorers: &[ScorerConfig],
    pruner: &dyn Pruner,
    budget: Budget,
    data: &Dataset,
    wave_options: WaveOptions,
    progress: Progress,
) -> Result<ScorerChoice> {
    let built = scorers.iter().map(ScorerConfig::build).collect::<moe_importance::Result<Vec<_>>>()?;
    if built.is_empty() {
        return Err(Error::Usage("no scorer to choose from".into()));
    }
    if pruner.needs().probe != Questions::NONE {
        let reason = "a pruner that asks the running model takes one scorer; name it";
        return Err(Error::Usage(format!("scores of several scorers: {reason}")));
    }
    let (mut scored, mut compared): (Vec<Sequence>, Vec<Sequence>) = Default::default();
    for (index, sequence) in data.sequences.iter().enumerate() {
        let side = if index % HELD_BACK == HELD_BACK - 1 { &mut compared } else { &mut scored };
        side.push(sequence.clone());
    }
    if compared.is_empty() {
        let found = data.sequences.len();
        return Err(Error::Invalid(format!("{found} sequences to choose a scorer on, expected at least {HELD_BACK}")));
    }
    let scored = Dataset::from_sequences(scored);
    let bar = progress.bar("choosing a scorer", 1 + built.len() as u64, Unit::Count("scorers"));
    let calibration = Calibration::new(model, &scored, wave_options).scorers(built.iter().map(|scorer| &**scorer));
    let statistics = calibration.run(&mut |_| ())?;
    bar.step();
    let compared = waves(&compared, wave_options);
    let tokens = TEACHER_TOKENS.min(model.config().vocab_size);
    let teacher = TeacherLogits::record(&Engine::new(model, EngineOptions::default()), &compared, tokens)?;
    let base = model.checkpoint();
    let pruned = |scorer: &dyn Scorer| -> Result<std::result::Result<Model, String>> {
        let table: ScoreTable = scorer.score(&statistics, base.as_ref())?;
        let none = ProtectionMask::none();
        let request = PruneRequest::new(&table, base.shape(), budget, &none);
        let plan = match pruner.prune_with(&request, &mut NoProbe) {
            Ok(pruned) => pruned.plan,
            Err(error) => return Ok(Err(error.to_string())),
        };
        // Layers that predict further tokens are not run.
        let options = PruneOptions { mtp: Some(Mtp::Drop), ..PruneOptions::new(PruneForm::Ragged) };
        Ok(Ok(model.like(plan.on(base, &options)?.model().clone())?))
    };
    let mut tried = Vec::with_capacity(built.len());
    for scorer in &built {
        let (divergence, reason) = match pruned(scorer.as_ref())? {
            Ok(student) => (Some(divergence(&student, &teacher, &compared)?), None),
            Err(reason) => (None, Some(reason)),
        };
        tried.push(TriedScorer { scorer: scorer.name().into(), divergence, reason });
        bar.step();
    }
    let possible = tried.iter().enumerate().filter_map(|(index, tried)| Some((index, tried.divergence?)));
    match possible.min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((best, _)) => Ok(ScorerChoice { best, tried }),
        None => {
            let reasons: Vec<String> = tried.into_iter().filter_map(|tried| tried.reason).collect();
            Err(Error::Invalid(format!("the pruner can use no scores that there are: {}", reasons.join("; "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_told_with_the_least_divergence_first() {
        let tried = |scorer: &str, divergence| TriedScorer { scorer: scorer.into(), divergence, reason: None };
        let tried = vec![tried("fisher", Some(0.5)), tried("reap", None), tried("taylor", Some(0.25))];
        let choice = ScorerChoice { best: 2, tried };
        let told = "scores by taylor (chosen by divergence in nats: taylor 0.2500, fisher 0.5000, reap impossible)";
        assert_eq!(choice.why(), told);
    }
}
