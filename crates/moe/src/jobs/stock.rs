//! The form of a pruned model that stock loaders read, chosen by what it costs.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Mtp, ProtectionMask, ScoreTable};
use moe_core::data::Wave;
use moe_core::evaluate::divergence;
use moe_core::{Engine, EngineOptions, Model, TeacherLogits};
use moe_prune::{
    Budget, EditSource, FineGrained, PruneForm, PruneOptions, PrunePlan, PrunedModel, Pruner, Scope, TrialOptions,
    UnitPruner,
};
use serde::{Deserialize, Serialize};

use crate::progress::{Progress, Unit};
use crate::recipe::{Form, Prune};
use crate::{Error, Result};

/// Pieces of an expert that are tried: eight where they stay as wide as kernels of serving engines like it.
const PIECES: [usize; 3] = [2, 4, 8];
/// Widths that are multiples of it need no zeros beside them in stock loaders.
const ALIGNMENT: usize = 8;
/// Widths that are multiples of it are what kernels of serving engines are tuned for.
const SERVING: usize = 64;
/// Pieces per token that are tried, as shares of those that keep what a token computes.
const PER_TOKEN: [f64; 3] = [0.5, 0.75, 1.0];
/// Likeliest tokens per position that divergences are of.
const TEACHER_TOKENS: usize = 256;

/// The form a model is pruned in, and how it was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StockForm {
    /// What the model looks like.
    pub form: Form,
    /// Pieces of an expert, where experts are in pieces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pieces: Option<usize>,
    /// Pieces per token; none for as many as keep what a token computes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Factors of the experts of each layer, where they were fitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<Vec<Vec<f32>>>,
    /// Divergence from the full model, in nats, if it decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// Everything that was tried, if divergence decided.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tried: Vec<TriedForm>,
}

/// A form that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriedForm {
    /// What it is called.
    pub form: String,
    /// Pieces per token, where experts are in pieces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Units that an expert or a piece has.
    pub width: usize,
    /// Divergence from the full model, in nats; none where the form is impossible.
    pub divergence: Option<f64>,
    /// Why it is impossible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl StockForm {
    fn plain(form: Form) -> Self {
        Self { form, pieces: None, top_k: None, scales: None, divergence: None, tried: Vec::new() }
    }

    pub(crate) fn pieces(pieces: usize, top_k: Option<usize>) -> Self {
        Self { pieces: Some(pieces), top_k, ..Self::plain(Form::FineGrained) }
    }

    /// The form of a model that is in this one already, so that only its values change.
    pub(crate) fn as_it_is(&self) -> Self {
        Self::plain(match self.form {
            Form::Auto | Form::Uniform | Form::FineGrained => Form::Uniform,
            Form::Ragged => Form::Ragged,
            Form::Masked => Form::Masked,
        })
    }

    /// What the form is called.
    pub fn name(&self) -> String {
        match (self.form, self.pieces) {
            (Form::FineGrained, Some(pieces)) => format!("fine_grained in {pieces} pieces"),
            (Form::Uniform | Form::Auto, _) => "uniform".into(),
            (Form::Ragged, _) => "ragged".into(),
            (Form::Masked, _) => "masked".into(),
            (Form::FineGrained, None) => "fine_grained".into(),
        }
    }

    /// How it was chosen: the least divergence of every form that was tried, and what was impossible.
    pub fn why(&self) -> String {
        if self.tried.is_empty() {
            return String::new();
        }
        let mut forms: Vec<&TriedForm> = self.tried.iter().collect();
        forms.sort_by(|a, b| a.divergence.unwrap_or(f64::INFINITY).total_cmp(&b.divergence.unwrap_or(f64::INFINITY)));
        let mut told: Vec<(&str, String)> = Vec::new();
        for tried in forms {
            if told.iter().all(|(form, _)| *form != tried.form) {
                let found = match tried.divergence {
                    Some(nats) => format!("{nats:.4}"),
                    None => "impossible".into(),
                };
                told.push((&tried.form, format!("{} {found}", tried.form)));
            }
        }
        let told: Vec<String> = told.into_iter().map(|(_, told)| told).collect();
        format!(" (chosen by divergence in nats: {})", told.join(", "))
    }

    /// The model that a plan makes in this form; `ranking` orders the units of an expert among its pieces.
    ///
    /// # Errors
    /// Those of [`PrunePlan::on`].
    pub fn on(
        &self,
        plan: &PrunePlan,
        base: &Arc<Checkpoint>,
        mtp: Option<Mtp>,
        ranking: Option<&ScoreTable>,
        edits: Option<Arc<dyn EditSource>>,
    ) -> Result<PrunedModel> {
        let ranking = ranking.filter(|table| table.granularity == moe_checkpoint::Granularity::Unit);
        let form = self.form.with(FineGrained {
            top_k: self.top_k,
            ranking,
            scales: self.scales.as_deref(),
            ..FineGrained::new(self.pieces.unwrap_or(2))
        });
        Ok(plan.on(base, &PruneOptions { mtp, edits, ..PruneOptions::new(form) })?)
    }
}

/// The form of a plan that is made: the one asked for, or for `auto` the one that stock loaders read.
pub(crate) fn settled(step: &Prune, plan: &PrunePlan) -> Result<StockForm> {
    match step.form {
        Form::FineGrained => Ok(StockForm::pieces(step.pieces.unwrap_or(2), step.pieces_per_token)),
        Form::Auto => {
            let shape = plan.pruned_shape();
            let mut widths = shape.layers.iter().flat_map(|layer| layer.widths.iter());
            let first = widths.next().copied();
            let counts = shape.layers.iter().map(|layer| layer.num_experts());
            let same = widths.all(|width| Some(*width) == first)
                && counts.clone().all(|count| Some(count) == shape.layers.first().map(|layer| layer.num_experts()));
            match same {
                true => Ok(StockForm::plain(Form::Uniform)),
                false => Err(Error::Usage(
                    "prune: the plan gives experts different widths or layers different numbers of experts, which no stock loader \
                     reads as they are; form fine_grained (pieces), ragged (these crates) or masked (zeros)"
                        .into(),
                )),
            }
        }
        form => Ok(StockForm::plain(form)),
    }
}

/// Prunes in every form that stock loaders read and takes the one whose model stays closest to the full one: one width
/// for all experts, and experts in pieces. Factors of pieces are fitted on two thirds of the waves, and divergences are
/// of the others; of a single wave, both. A form that would keep more than was asked for, by more than the rounding of
/// widths to multiples of 8 or to whole pieces, is impossible.
///
/// # Errors
/// [`Error::Invalid`] where no form is possible, with the reason of each; whatever stops the model.
pub fn closest_stock_form(
    model: &Model,
    scores: &ScoreTable,
    ratio: f64,
    waves: &[Wave],
    mtp: Option<Mtp>,
    progress: Progress,
) -> Result<(PrunePlan, StockForm)> {
    let base = model.checkpoint();
    // Whole waves, at least one on each side where there are two.
    let split = (waves.len() * 2 / 3).clamp(1, waves.len().saturating_sub(1).max(1));
    let (calibration, comparison) = match waves.len() {
        0 => return Err(Error::Invalid("no rows to choose a form on".into())),
        1 => (waves, waves),
        _ => waves.split_at(split),
    };
    let whole = base.shape().uniform_width().unwrap_or(0);
    let pieces: Vec<usize> = PIECES.into_iter().filter(|pieces| fits(whole, *pieces)).collect();
    // Where no number of pieces fits, stock loaders get zeros beside the units of a piece.
    let pieces = if pieces.is_empty() { PIECES[..2].to_vec() } else { pieces };
    let bar = progress.bar("choosing a form", 1 + pieces.len() as u64, Unit::Count("forms"));
    let engine = Engine::new(model, EngineOptions::default());
    let tokens = TEACHER_TOKENS.min(model.config().vocab_size);
    let teacher = TeacherLogits::record(&engine, comparison, tokens)?;
    let mut best: Option<(PrunePlan, StockForm)> = None;
    let mut offer = |plan: &PrunePlan, chosen: StockForm| {
        let closer = best.as_ref().is_none_or(|(_, best)| chosen.divergence < best.divergence);
        if closer {
            best = Some((plan.clone(), chosen));
        }
    };
    let mut all_tried: Vec<TriedForm> = Vec::new();
    let units = base.shape().units();
    let asked = units - (units as f64 * ratio).round() as usize;
    let mut most = asked;
    let impossible = |form: String, width: usize, error: moe_prune::Error| TriedForm {
        form,
        top_k: None,
        width,
        divergence: None,
        reason: Some(error.to_string()),
    };
    // A width between two multiples is the upper one in stock loaders: units in place of zeros.
    let aligned = if whole > ALIGNMENT && whole.is_multiple_of(ALIGNMENT) { ALIGNMENT } else { 1 };
    let uniform = UnitPruner::new(Scope::Expert)
        .round_to(aligned)
        .prune(scores, base.shape(), Budget::Ratio(ratio), &ProtectionMask::none())
        .and_then(|pruned| {
            let form = StockForm::plain(Form::Uniform);
            let on = pruned.plan.on(base, &PruneOptions { mtp, ..PruneOptions::new(PruneForm::Uniform) })?;
            Ok((pruned.plan, form, on))
        });
    match uniform {
        Ok((plan, form, on)) => {
            let student = model.like(on.model().clone())?;
            let divergence = divergence(&student, &teacher, comparison)?;
            most = most.max(plan.units_kept());
            let width = plan.pruned_shape().uniform_width().unwrap_or(0);
            let divergence = Some(divergence);
            all_tried.push(TriedForm { form: form.name(), top_k: None, width, divergence, reason: None });
            offer(&plan, StockForm { divergence, ..form });
        }
        Err(error) => all_tried.push(impossible("uniform".into(), 0, error)),
    }
    bar.step();
    for pieces in pieces {
        let how = FineGrained { ranking: Some(scores), ..FineGrained::new(pieces) };
        let all = model.config().routing.top_k * pieces;
        let mut top_k: Vec<usize> =
            PER_TOKEN.iter().map(|part| ((all as f64 * part).round() as usize).max(1)).collect();
        top_k.dedup();
        let smallest = FineGrained { top_k: top_k.iter().min().copied(), ..how };
        let trials = smallest.prune(scores, base, ratio).and_then(|plan| {
            // A layer may keep a part of a piece more than was asked for; where groups of experts are split, numbers of
            // pieces go up in larger steps, and a larger model is closer for its size alone.
            let (kept, most) = (plan.units_kept(), most.max(asked + base.shape().layers.len() * whole / pieces));
            if kept > most {
                let what = format!("the model in {pieces} pieces per expert");
                let reason = format!("it would keep {kept} of {units}");
                return Err(moe_prune::Error::Infeasible { what, asked, reason });
            }
            let options =
                TrialOptions { top_k: &top_k, fit: None, edits: None, calibration, comparison, teacher_tokens: tokens };
            Ok((how.try_top_k(model, &plan, &options)?, plan))
        });
        match trials {
            Ok((trials, plan)) => {
                for trial in trials {
                    let chosen = StockForm::pieces(pieces, Some(trial.top_k));
                    all_tried.push(TriedForm {
                        form: chosen.name(),
                        top_k: chosen.top_k,
                        width: whole / pieces,
                        divergence: Some(trial.divergence),
                        reason: None,
                    });
                    offer(
                        &plan,
                        StockForm { scales: Some(trial.scales), divergence: Some(trial.divergence), ..chosen },
                    );
                }
            }
            Err(error) => {
                all_tried.push(impossible(StockForm::pieces(pieces, None).name(), whole / pieces, error));
            }
        }
        bar.step();
    }
    match best {
        Some((plan, chosen)) => Ok((plan, StockForm { tried: all_tried, ..chosen })),
        None => {
            let reasons: Vec<String> = all_tried.into_iter().filter_map(|tried| tried.reason).collect();
            Err(Error::Invalid(format!(
                "no form that stock loaders read is possible: {}. Form ragged opens with these crates",
                reasons.join("; ")
            )))
        }
    }
}

/// Whether pieces of experts of this width are of a width that stock loaders run as it is.
fn fits(width: usize, pieces: usize) -> bool {
    let multiple = if pieces > 4 { SERVING } else { ALIGNMENT };
    width.is_multiple_of(pieces) && (width / pieces).is_multiple_of(multiple) && width > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_widths_that_kernels_run() {
        let tried = |width: usize| PIECES.into_iter().filter(|pieces| fits(width, *pieces)).collect::<Vec<_>>();
        assert_eq!(tried(96), [2, 4]);
        assert_eq!(tried(768), [2, 4], "eight pieces of 96 are no multiple of 64");
        assert_eq!(tried(1024), [2, 4, 8]);
        assert_eq!(tried(1408), [2, 4]);
        assert_eq!(tried(24), Vec::<usize>::new());
        assert_eq!(tried(0), Vec::<usize>::new());
    }

    #[test]
    fn what_was_tried_is_told_once_per_form_the_least_first() {
        let tried = |form: &str, divergence: Option<f64>| TriedForm {
            form: form.into(),
            top_k: None,
            width: 8,
            divergence,
            reason: None,
        };
        let all = vec![tried("a", Some(0.3)), tried("b", Some(0.25)), tried("a", Some(0.125)), tried("c", None)];
        let chosen = StockForm { tried: all, ..StockForm::plain(Form::Uniform) };
        assert_eq!(chosen.why(), " (chosen by divergence in nats: a 0.1250, b 0.2500, c impossible)");
        assert_eq!(StockForm::plain(Form::Uniform).why(), "");
    }
}
