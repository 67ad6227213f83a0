//! Merging in directories that keep what was collected and merged: what `moe merge` and the step `merge` carry out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Mtp, ProtectionMask, Statistics, write_atomic};
use moe_core::data::Wave;
use moe_core::train::TrainEvent;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::Calibration;
use moe_merge::{
    Amount, CompactTrained, CompactTraining, Evidence, EvidenceOptions, MergeOptions, MergedModel, MergedWeights,
    OutputForm, Recipe, merge_sequentially_in_group,
};

use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// What is merged, how, and on which rows.
#[derive(Clone, Copy, Debug)]
pub struct Merging<'a> {
    /// The model.
    pub model: &'a Model,
    /// The rows that evidence is collected on.
    pub waves: &'a [Wave],
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Experts that nothing may change.
    pub protect: &'a ProtectionMask,
    /// What the outcome looks like.
    pub form: OutputForm,
    /// What becomes of layers that predict further tokens.
    pub mtp: Option<Mtp>,
    /// Tokens of each layer that alignments and least squares see.
    pub sample: usize,
    /// Whether all layers are merged on one pass, even if the recipe goes layer by layer.
    pub at_once: bool,
    /// Directories in which other processes left their shares of the evidence, which are taken over.
    pub absorb: &'a [PathBuf],
    /// Who collects the evidence together; the first rank merges.
    pub group: &'a dyn Group,
}

/// A merged model, and how long the model was run for it.
pub struct Merged {
    /// The model with its report.
    pub model: MergedModel,
    /// The merged experts, with the plan that they follow.
    pub weights: MergedWeights,
    /// Seconds of collecting evidence: 0 where it was there, and in a merge layer by layer.
    pub collect_seconds: f64,
}

/// Trains the low-rank and sparse parts of the experts of a merged model on `waves`, towards the model before
/// (MC-SMoE), and writes them to the directory `to`, which is replaced. The last twentieth of the waves decides which
/// values are kept.
///
/// # Errors
/// Options out of range, models that do not read the same tokens, whatever stops them.
pub fn train_parts(
    training: &CompactTraining,
    before: &Model,
    merged: &Model,
    waves: &[Wave],
    to: &Path,
    progress: Progress,
) -> Result<CompactTrained> {
    let held_out = if waves.len() > 1 { waves.len().div_ceil(20) } else { 0 };
    let (train, evaluation) = waves.split_at(waves.len() - held_out);
    let bar = progress.bar("training parts", training.train.steps(train.len()) as u64, Unit::Count("steps"));
    Ok(training.fit(before, merged, train, evaluation, to, true, &mut |event| {
        if let TrainEvent::Step { step, .. } = event {
            bar.at(*step as u64);
        }
        Ok(())
    })?)
}

impl Merging<'_> {
    /// Checks what recipe, protection, form and model show to be wrong.
    ///
    /// # Errors
    /// Parts that do not go together or not with the model.
    pub fn check(&self) -> Result<()> {
        self.protect.validate(self.model.checkpoint().shape())?;
        Ok(self.recipe.check(self.model.checkpoint(), self.form, self.mtp)?)
    }

    /// Checks that the passes over the rows have the memory they need, and the room below `work`. Gives the bytes that
    /// evidence and merged experts take there, at most.
    ///
    /// # Errors
    /// Memory or room that does not do.
    pub fn check_passes(&self, work: &Path) -> Result<u64> {
        let merged = self.bytes_merged()?;
        if self.layer_by_layer() {
            Engine::new(self.model, EngineOptions::default()).plan_layerwise(self.waves)?;
            return Ok(merged);
        }
        let seen = Calibration::of_waves(self.model, self.waves);
        let seen = self.evidence_options().observe(self.model, seen).store(work);
        seen.check()?;
        Ok(seen.space()? + merged)
    }

    /// Bytes of the experts that are left, in the dtype of the base: of those, the ones that were merged are kept.
    fn bytes_merged(&self) -> Result<u64> {
        let base = self.model.checkpoint();
        let mut bytes = 0.0;
        for layer in &base.shape().layers {
            let left = match self.recipe.budget.amount {
                Amount::Ratio(ratio) => 1.0 - ratio,
                Amount::Groups(groups) => (groups as f64 / layer.num_experts().max(1) as f64).min(1.0),
            };
            bytes += left * base.expert_bytes_on_disk(layer.layer)? as f64;
        }
        Ok(bytes as u64)
    }

    /// Whether each layer is merged before the next one is run.
    pub fn layer_by_layer(&self) -> bool {
        self.recipe.sequential && !self.at_once
    }

    /// What is collected.
    pub fn evidence_options(&self) -> EvidenceOptions {
        EvidenceOptions::for_recipe(self.recipe, self.sample)
    }

    /// Collects the evidence with the other ranks of the group, which all call this before the first of them merges. It
    /// is in `directory`, where a merge finds it; nothing is collected if it, or the merged experts in `merged`, are
    /// there already. What is merged layer by layer is merged wholly, into `merged`, which all ranks have to see. A
    /// group of one leaves all of it to [`Merging::merge`]. Gives the seconds that it took.
    ///
    /// # Errors
    /// Files that cannot be read or written; whatever stops the model on any rank.
    pub fn collect(&self, directory: &Path, merged: &Path, progress: Progress) -> Result<f64> {
        if self.group.size() == 1 {
            return Ok(0.0);
        }
        let there = MergedWeights::open(merged).is_ok() || self.stored_evidence(directory)?.is_some();
        if self.group.broadcast(0, vec![u8::from(there)])? == [1] {
            return Ok(0.0);
        }
        let start = Instant::now();
        if self.layer_by_layer() {
            self.merge_layers(merged, progress)?;
            return Ok(start.elapsed().as_secs_f64());
        }
        let statistics = self.seen(directory, None, progress)?;
        let waves = self.waves_in(directory);
        for turn in 0..self.group.size() {
            // The first keeps what all have; each of the others clears a disk of its own.
            if turn == 0 && self.group.rank() == 0 {
                self.keep_evidence(directory, &statistics)?;
            } else if turn == self.group.rank() && waves.exists() {
                std::fs::remove_dir_all(&waves).map_err(Error::io(&waves))?;
            }
            self.group.check(None)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// The evidence of this model, these rows and what the recipe reads, in `directory`: loaded if an earlier run left
    /// it there, otherwise collected and left there. A run that was killed goes on with the waves it has.
    ///
    /// # Errors
    /// Files that cannot be read or written; whatever stops the model.
    pub fn evidence(&self, directory: &Path, progress: Progress) -> Result<Evidence> {
        match self.stored_evidence(directory)? {
            Some(evidence) => Ok(evidence),
            None => self.keep_evidence(directory, &self.seen(directory, None, progress)?),
        }
    }

    fn stored_evidence(&self, directory: &Path) -> Result<Option<Evidence>> {
        let (path, asked) = evidence_files(directory);
        let digest = self.evidence_options().digest(self.model, self.waves);
        match path.exists() && std::fs::read_to_string(&asked).is_ok_and(|found| found == digest) {
            true => Ok(Some(Evidence::load(path)?)),
            false => Ok(None),
        }
    }

    /// Writes the evidence, in place of the waves that it is made of.
    fn keep_evidence(&self, directory: &Path, statistics: &Statistics) -> Result<Evidence> {
        let (path, asked) = evidence_files(directory);
        let evidence = Evidence::from_statistics(statistics)?;
        evidence.validate(self.model.checkpoint().shape())?;
        evidence.save(&path)?;
        // Last: without it, what stands beside it is not whole.
        write_atomic(&asked, self.evidence_options().digest(self.model, self.waves).as_bytes())?;
        let waves = self.waves_in(directory);
        if waves.exists() {
            std::fs::remove_dir_all(&waves).map_err(Error::io(&waves))?;
        }
        Ok(evidence)
    }

    /// Merges layer by layer, with the other ranks of the group.
    fn merge_layers(&self, merged: &Path, progress: Progress) -> Result<MergedWeights> {
        let _bar = progress.bar("merging layer by layer", 0, Unit::Count("layers"));
        let Self { model, waves, recipe, protect, group, .. } = *self;
        let options = self.evidence_options();
        Ok(merge_sequentially_in_group(group, model, waves, recipe, protect, &options, merged)?)
    }

    /// Collects one share of the evidence, `(index, count)`, in `directory`: the waves index, index + count, …
    ///
    /// # Errors
    /// A recipe that is merged layer by layer, where each layer is seen as the layers before it were merged; whatever
    /// stops the model.
    pub fn share(&self, directory: &Path, shard: (usize, usize), progress: Progress) -> Result<()> {
        if self.layer_by_layer() {
            return Err(Error::Usage(format!(
                "a share of `{}`: it merges layer by layer, each layer on what the merged ones before it give",
                self.recipe.name
            )));
        }
        self.seen(directory, Some(shard), progress).map(drop)
    }

    /// Waves of other evidence are kept apart: they may be wanted again.
    fn waves_in(&self, directory: &Path) -> PathBuf {
        let digest = self.evidence_options().digest(self.model, self.waves);
        directory.join(format!("evidence.{}.waves", &digest[..16]))
    }

    fn seen(&self, directory: &Path, shard: Option<(usize, usize)>, progress: Progress) -> Result<Statistics> {
        // The first rank takes them over.
        let absorbed = self.absorb.iter().filter(|_| self.group.rank() == 0);
        let others: Vec<PathBuf> = absorbed.map(|other| self.waves_in(other)).collect();
        if let Some((other, _)) = self.absorb.iter().zip(&others).find(|(_, waves)| !waves.exists()) {
            let reason = "found no evidence of this model, recipe and data, expected a share of it";
            return Err(Error::Invalid(format!("{}: {reason}", other.display())));
        }
        let mut calibration = self
            .evidence_options()
            .observe(self.model, Calibration::of_waves(self.model, self.waves))
            .group(self.group)
            .store(self.waves_in(directory))
            .absorb(others);
        if let Some((index, count)) = shard {
            calibration = calibration.shard(index, count);
        }
        let bar = progress.bar("collecting", 0, Unit::Count("tokens"));
        Ok(calibration.run(&mut |at| {
            bar.total(at.tokens);
            bar.at(at.tokens_done);
        })?)
    }

    /// Merges. Evidence is in `evidence` and serves other recipes, budgets and forms; merged experts are in `merged`,
    /// which is a directory of this merge alone. What an earlier run left in either is gone on with, and merged experts
    /// that are complete need neither evidence nor another pass.
    ///
    /// # Errors
    /// A plan that the recipe cannot make, whatever stops the model, a directory of another merge.
    pub fn merge(&self, evidence: &Path, merged: &Path, progress: Progress) -> Result<Merged> {
        let base = self.model.checkpoint();
        let mut collect_seconds = 0.0;
        // A directory that is complete opens.
        let weights = if let Ok(complete) = MergedWeights::open(merged) {
            complete
        } else if self.layer_by_layer() {
            let alone = Self { group: &Alone, ..*self };
            alone.merge_layers(merged, progress)?
        } else {
            let start = Instant::now();
            let evidence = Arc::new(self.evidence(evidence, progress)?);
            collect_seconds = start.elapsed().as_secs_f64();
            let plan = self.recipe.plan(base, &evidence, self.protect)?;
            plan.compute(base, Some(&evidence), merged)?
        };
        let options = MergeOptions { merged: Some(weights.clone()), mtp: self.mtp, ..MergeOptions::new(self.form) };
        let model = weights.plan().on(base, &options)?;
        Ok(Merged { model, weights, collect_seconds })
    }
}

/// The evidence, and what was asked for it.
fn evidence_files(directory: &Path) -> (PathBuf, PathBuf) {
    (directory.join("evidence.safetensors"), directory.join("evidence.json"))
}
