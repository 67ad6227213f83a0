//! A pruned model: what a plan makes of the full one, and what repairs changed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, LayerRole, Mtp, Role, ScoreTable};
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_core::{Engine, EngineOptions, Model};
use moe_peft::TrainingRun;
use moe_peft::fold::FoldPrecision;
use moe_prune::{
    EditSource, Edits, EngineProbe, FineGrained, ModelProbe, NoProbe, ProbeOptions, ProtectionMask, PruneForm,
    PruneOptions, PrunePlan, PruneRequest, Pruner, ScaleCalibration, ScaleFit,
};

use super::catalog::{Pieces, RepairStep, Tuning};
use crate::progress::Progress;
use crate::{Error, Result};
use moe::jobs::closest_stock_form;

/// Tokens of a step of a search by gradients.
const SEARCH_TOKENS: usize = 1024;
/// Tokens of a step of training.
const TRAINING_TOKENS: usize = 512;

/// A pruned model.
pub struct Subject<'m> {
    full: &'m Model,
    /// The model in another form than its plan says, such as in pieces.
    exported: Option<Model>,
    /// What is kept of the full model.
    pub plan: PrunePlan,
    /// What is kept of the exported one: everything.
    whole: Option<PrunePlan>,
    edits: Edits,
    /// Parameters of routed experts, where they are not those of the plan, and what goes besides of the exported
    /// checkpoint.
    compressed: Option<(u64, u64)>,
    /// What was chosen by measuring.
    pub chosen: Option<String>,
}

impl<'m> Subject<'m> {
    /// By a plan.
    pub fn planned(full: &'m Model, plan: PrunePlan) -> Self {
        Self { full, exported: None, plan, whole: None, edits: Edits::new(), compressed: None, chosen: None }
    }

    /// By a model of its own, of which everything is kept; `plan` says what is left of the full model.
    pub fn exported(full: &'m Model, exported: Model, plan: PrunePlan) -> Self {
        let whole = PrunePlan::keep_all(exported.checkpoint().shape(), exported.checkpoint().fingerprint());
        Self { exported: Some(exported), whole: Some(whole), ..Self::planned(full, plan) }
    }

    /// The same with experts compressed from as many parameters to as many.
    pub fn compressed(self, before: u64, after: u64) -> Self {
        Self { compressed: Some((after, before - after)), ..self }
    }

    /// Parameters of routed experts.
    pub fn routed_parameters(&self) -> u64 {
        self.compressed.map_or(self.plan.pruned_shape().parameters(), |(routed, _)| routed)
    }

    /// Prunes by a pruner. Pruners that ask the model are answered on `calibration`.
    ///
    /// # Errors
    /// Scores or a budget that it refuses; whatever stops the model.
    pub fn pruned(
        full: &'m Model,
        pruner: &dyn Pruner,
        scores: &ScoreTable,
        ratio: f64,
        calibration: &[Wave],
    ) -> Result<Self> {
        let shape = full.checkpoint().shape();
        let protect = ProtectionMask::none();
        let request = PruneRequest::new(scores, shape, moe_prune::Budget::Ratio(ratio), &protect);
        let prune = |probe: &mut dyn ModelProbe| pruner.prune_with(&request, probe);
        let pruned = if pruner.needs().probe.any() {
            let engine = Engine::new(full, EngineOptions::default());
            let options = ProbeOptions { batch_waves: 1, ..ProbeOptions::default() };
            prune(&mut EngineProbe::new(&engine, small_waves(calibration, SEARCH_TOKENS), options)?)?
        } else {
            prune(&mut NoProbe)?
        };
        Ok(Self::planned(full, pruned.plan))
    }

    /// Cuts experts into pieces and keeps the best of every layer.
    ///
    /// # Errors
    /// Scores, a budget or a model that cannot be cut so; whatever stops the model.
    pub fn pieces(
        full: &'m Model,
        pieces: Pieces,
        scores: &ScoreTable,
        ratio: f64,
        calibration: &[Wave],
    ) -> Result<Self> {
        let from = full.checkpoint();
        let how = FineGrained { top_k: pieces.top_k, ranking: Some(scores), ..FineGrained::new(pieces.pieces) };
        let plan = how.prune(scores, from, ratio)?;
        let scales = match pieces.scaled {
            false => None,
            true => {
                let mut sums = ScaleCalibration::new(from, &plan, None, ScaleFit::default(), &[how])?;
                let engine = Engine::new(full, EngineOptions::default());
                calibration.iter().try_for_each(|wave| engine.run(wave, &mut sums).map(drop))?;
                Some(sums.scales(0))
            }
        };
        let how = FineGrained { scales: scales.as_deref(), ..how };
        // Layers that predict further tokens are not run.
        let options = PruneOptions { mtp: Some(Mtp::Drop), ..PruneOptions::new(PruneForm::FineGrained(how)) };
        let pruned = plan.on(from, &options)?;
        Ok(Self::exported(full, Model::new(pruned.model().clone(), full.device(), full.max_memory())?, plan))
    }

    /// In the form that stock loaders read and that stays closest to the full model.
    ///
    /// # Errors
    /// Scores or a budget that no form can have; whatever stops the model.
    pub fn stock(full: &'m Model, scores: &ScoreTable, ratio: f64, calibration: &[Wave]) -> Result<Self> {
        // Layers that predict further tokens are not run.
        let mtp = Some(Mtp::Drop);
        let waves = small_waves(calibration, SEARCH_TOKENS);
        let (plan, form) = closest_stock_form(full, scores, ratio, &waves, mtp, Progress::hidden())?;
        let pruned = form.on(&plan, full.checkpoint(), mtp, Some(scores), None)?;
        let width = pruned.model().shape().uniform_width().unwrap_or(0);
        let chosen = match (form.pieces, form.top_k) {
            (Some(pieces), Some(top_k)) => format!("{pieces} pieces of {width}, {top_k} per token"),
            _ => format!("{} of {width}", form.name()),
        };
        let subject = Self::exported(full, Model::new(pruned.model().clone(), full.device(), full.max_memory())?, plan);
        Ok(Self { chosen: Some(chosen), ..subject })
    }

    /// The checkpoint that the model is seen through, and what is kept of it.
    fn base(&self) -> (&Model, &PrunePlan) {
        (self.exported.as_ref().unwrap_or(self.full), self.whole.as_ref().unwrap_or(&self.plan))
    }

    /// The model, with what repairs changed in the precision of its checkpoint.
    ///
    /// # Errors
    /// Those of [`PrunePlan::on`].
    pub fn model(&self) -> Result<Model> {
        if let Some(exported) = self.exported.as_ref().filter(|_| self.edits.is_empty()) {
            let (experts, routing) = (exported.expert_overlay(), exported.routing_overlay());
            return Ok(exported.with_overlays(experts.cloned(), routing.cloned())?);
        }
        let (base, plan) = self.base();
        // What is whole stays as it is but for edits; any plan and biases are at home in ragged experts.
        let form = if self.whole.is_some() { PruneForm::Masked } else { PruneForm::Ragged };
        let edits = (!self.edits.is_empty()).then(|| Arc::new(self.edits.clone()) as Arc<dyn EditSource>);
        let options = PruneOptions { mtp: Some(Mtp::Keep), edits, ..PruneOptions::new(form) };
        let pruned: Arc<Checkpoint> = plan.on(base.checkpoint(), &options)?.model().clone();
        Ok(Model::new(pruned, base.device(), base.max_memory())?)
    }

    /// Repairs it on these rows.
    ///
    /// # Errors
    /// Whatever stops the repair; [`Error::Invalid`] for one that needs a plan of the full model where there is an
    /// export.
    pub fn repair(&mut self, step: &RepairStep, rows: &[Wave]) -> Result<()> {
        let student = self.model()?;
        let (base, plan) = self.base();
        let teacher = self.full;
        let own = |name: &str| match self.exported {
            None => Ok(()),
            Some(_) => Err(Error::Invalid(format!("repair {name} works on a plan, not on an export as pieces"))),
        };
        let edits = match step {
            RepairStep::LayerRefit(refit) => refit.fit(teacher, &student, rows, &mut |_, _| ())?.edits.of_plan(plan)?,
            RepairStep::Refit(refit) => {
                own("refit")?;
                refit.fit(base, plan, rows, &mut |_, _| ())?
            }
            RepairStep::MeanOutput(mean) => {
                own("mean_output")?;
                mean.fit(base, plan, rows, &mut |_, _| ())?
            }
            RepairStep::RouterDistillation(distillation) => {
                let (training, evaluation) = training_waves(rows);
                distillation.fit(teacher, &student, &training, &evaluation, &mut |_| Ok(()))?.edits.of_plan(plan)?
            }
            RepairStep::Tune(tuning) => {
                if self.compressed.is_some() {
                    let reason = "experts of low rank and sparse rows, which a LoRA that is folded in would fill";
                    return Err(Error::Invalid(format!("repair tune: {reason}")));
                }
                let tuned = tuned(&student, tuning, rows)?;
                self.whole = Some(PrunePlan::keep_all(tuned.checkpoint().shape(), tuned.checkpoint().fingerprint()));
                (self.exported, self.edits) = (Some(tuned), Edits::new());
                return Ok(());
            }
        };
        self.edits.extend(edits);
        Ok(())
    }

    /// What tells one plan from another, unless there is more than the plan.
    ///
    /// # Errors
    /// A plan that cannot be written.
    pub fn key(&self) -> Result<Option<blake3::Hash>> {
        if self.exported.is_some() || !self.edits.is_empty() {
            return Ok(None);
        }
        let json = serde_json::to_vec(&self.plan.kept).map_err(|error| Error::Invalid(error.to_string()))?;
        Ok(Some(blake3::hash(&json)))
    }

    /// Parameters of the checkpoint.
    ///
    /// # Errors
    /// A model without routers.
    pub fn parameters(&self) -> Result<u64> {
        if let Some(exported) = &self.exported {
            return Ok(exported.checkpoint().parameters() - self.compressed.map_or(0, |(_, gone)| gone));
        }
        let checkpoint = self.full.checkpoint();
        let dropped = self.plan.shape.parameters() - self.plan.pruned_shape().parameters();
        let mut rows = 0;
        for kept in self.plan.kept.iter().filter(|kept| !kept.removed.is_empty()) {
            let router = &checkpoint.role(Role::Layer(kept.layer, LayerRole::Router))?.shape;
            rows += (router.iter().product::<usize>() / kept.experts.len() * kept.removed.len()) as u64;
        }
        let biases: u64 =
            self.edits.experts().map(|(_, edit)| edit.down_bias.as_ref().map_or(0, Vec::len) as u64).sum();
        Ok(checkpoint.parameters() - dropped - rows + biases)
    }
}

/// A model after a fine-tuning on some rows, of which no file is kept.
fn tuned(model: &Model, tuning: &Tuning, rows: &[Wave]) -> Result<Model> {
    let directory = tempfile::tempdir().map_err(Error::io(Path::new("a temporary directory")))?;
    let run = TrainingRun {
        model,
        waves: &small_waves(rows, tuning.step_tokens),
        labels: &BTreeMap::new(),
        directory: directory.path(),
        save_every: usize::MAX,
        resume: false,
        fold: FoldPrecision::Bf16,
    };
    let trained = run.train(&tuning.recipe, &mut |_| Ok(()))?;
    let stays = || Error::Invalid("a repair whose outcome stays beside the weights".into());
    trained.as_written(model, model.max_memory())?.ok_or_else(stays)
}

/// Waves to train on, and every fourth, which says when to stop.
pub(super) fn training_waves(rows: &[Wave]) -> (Vec<Wave>, Vec<Wave>) {
    let (mut training, mut evaluation) = (Vec::new(), Vec::new());
    for (index, wave) in small_waves(rows, TRAINING_TOKENS).into_iter().enumerate() {
        if index % 4 == 3 { evaluation.push(wave) } else { training.push(wave) }
    }
    (training, evaluation)
}

/// The same sequences in waves of about so many tokens.
fn small_waves(calibration: &[Wave], tokens: usize) -> Vec<Wave> {
    let sequences: Vec<Sequence> = calibration.iter().flat_map(|wave| wave.sequences.clone()).collect();
    let tokens = std::num::NonZeroUsize::new(tokens).unwrap_or(std::num::NonZeroUsize::MIN);
    waves(&sequences, WaveOptions::Tokens(tokens))
}
