//! The step that fine-tunes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::Checkpoint;
use moe_checkpoint::group::{Alone, Group};
use moe_core::Model;
use moe_core::adaptive::RunTime;
use moe_core::data::{DatasetOptions, Tokenizer, WaveOptions};
use moe_peft::{MethodConfig, Setting, TrainingRun, TuningMethod};

use super::artifacts::Artifacts;
use super::steps::{Done, json};
use super::{Calibration, Run};
use crate::recipe::{Data, Recipe, Tune};
use crate::{Error, Result, jobs};

/// The rows that a step trains on, in waves of a step's tokens.
pub(super) fn rows(step: &Tune, of: &Recipe, tokenizer: Option<&Tokenizer>, vocab_size: usize) -> Result<Calibration> {
    let recipe = step.recipe(of.seed)?;
    let files = if step.data.is_empty() { &of.data.calibration } else { &step.data };
    if files.is_empty() {
        return Err(Error::Usage("neither data of its own nor data.calibration".into()));
    }
    let data = Data {
        calibration: files.clone(),
        samples: step.samples.unwrap_or(of.data.samples),
        wave_tokens: step.step_tokens,
        loss: step.loss,
        ..of.data.clone()
    };
    let options = DatasetOptions {
        seed: Some(of.seed),
        // A model that never saw an answer end does not end its own.
        end_completions: true,
        label: recipe.labels,
        ..DatasetOptions::default()
    };
    Calibration::load_as(&data, &options, tokenizer, vocab_size)
}

/// Checks what the recipe and the rows show to be wrong and what memory they take, and the method against the model
/// where that is the one that will be trained.
pub(super) fn check(
    step: &Tune,
    of: &Recipe,
    tokenizer: Option<&Tokenizer>,
    model: &Model,
    unchanged: bool,
) -> Result<()> {
    let recipe = step.recipe(of.seed)?;
    let rows = rows(step, of, tokenizer, model.config().vocab_size)?;
    let labels = rows.data.labels_of(&rows.waves);
    let mut setting = Setting::new(model).with_waves(&rows.waves);
    setting.labels = &labels;
    match unchanged {
        true => recipe.check(&setting)?,
        false => setting.check_memory()?,
    }
    Ok(())
}

impl Run<'_> {
    /// Fine-tunes the model: the next steps see the trained weights, and what stays beside them.
    pub(super) fn tune(&mut self, step: &Tune) -> Result<Done> {
        let mut recipe = step.recipe(self.recipe.seed)?;
        if let (Some(beside), MethodConfig::Mixture(config)) = (&self.beside, &mut recipe.method) {
            config.start.get_or_insert_with(|| beside.clone());
        }
        let vocabulary = self.model.config().vocab_size;
        let rows = rows(step, self.recipe, self.tokenizer.as_ref(), vocabulary)?;
        let WaveOptions::Tokens(tokens) = rows.options else {
            return Err(Error::Invalid("tune: rows that are not in waves of tokens".into()));
        };
        let precision = json(&(step.base_precision, step.fold_precision))?;
        let of = [json(&recipe)?, self.model.fingerprint(), rows.data.hash.clone(), tokens.to_string(), precision];
        let (dir, reused) = self.artifacts.begin("tune", &of.each_ref().map(String::as_str))?;
        if !reused {
            let model = jobs::trained_on(&self.model, step.base_precision, &self.device, self.max_memory)?
                .with_precision(self.recipe.precision);
            let labels = rows.data.labels_of(&rows.waves);
            let training = TrainingRun {
                model: &model,
                waves: &rows.waves,
                labels: &labels,
                directory: &dir,
                save_every: step.save_every.get(),
                resume: true,
                fold: step.fold_precision,
            };
            let name = recipe_name(&recipe)?;
            // By the first rank alone, if the method cannot be shared out.
            let shareable = recipe.check_shareable(self.options.group.size()).is_ok();
            let group: &dyn Group = if shareable { self.options.group } else { &Alone };
            let trained = jobs::train(&training, &recipe, &name, false, group, self.options.progress)?;
            let save = || {
                jobs::save(&training, &recipe, &trained)?;
                Artifacts::finish(&dir)
            };
            match shareable {
                true => self.on_first(|_| save())?,
                false => save()?,
            }
        }
        let (adapter, folded) = (dir.join("adapter"), dir.join("model"));
        let name = recipe_name(&recipe)?;
        let beside = match step.fold && folded.exists() {
            true => {
                self.model = Arc::new(Checkpoint::open(&folded)?);
                self.run_time = RunTime::beside(&folded)?.or(std::mem::take(&mut self.run_time));
                // Condensers and compressed experts are files beside the weights.
                moe_peft::open(&folded).is_ok().then_some(folded)
            }
            false => Some(adapter),
        };
        let how = match &beside {
            None => "in the weights",
            Some(dir) if dir.join("config.json").exists() => "in the weights and in files beside them",
            Some(_) => "as an adapter",
        };
        self.beside = beside;
        self.pruned = None;
        let sequences = rows.data.sequences.len();
        let summary = format!("trained by `{name}` on {sequences} sequences, {how}");
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }

    /// Puts what stays beside the weights beside a model that was written; where, if that is a folder of its own.
    pub(super) fn write_beside(&self, to: &Path) -> Result<Option<PathBuf>> {
        let Some(from) = &self.beside else { return Ok(None) };
        let saved = moe_peft::open(from)?;
        if saved.is_checkpoint() {
            for kind in saved.kinds() {
                copy(&from.join(kind.file()), &to.join(kind.file()))?;
            }
            return Ok(None);
        }
        let mut name = to.file_name().unwrap_or_default().to_os_string();
        name.push("-adapter");
        let target = to.with_file_name(name);
        std::fs::create_dir_all(&target).map_err(Error::io(&target))?;
        for entry in std::fs::read_dir(from).map_err(Error::io(from))? {
            let path = entry.map_err(Error::io(from))?.path();
            if let (true, Some(name)) = (path.is_file(), path.file_name()) {
                copy(&path, &target.join(name))?;
            }
        }
        Ok(Some(target))
    }
}

/// What a recipe of fine-tuning trains.
fn recipe_name(recipe: &moe_peft::Recipe) -> Result<String> {
    let method = serde_json::to_value(&recipe.method).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(method.get("type").and_then(|name| name.as_str()).unwrap_or("own").to_string())
}

/// A file that is there whole or not at all.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).map_err(Error::io(from))?;
    Ok(moe_checkpoint::write_atomic(to, &bytes)?)
}
