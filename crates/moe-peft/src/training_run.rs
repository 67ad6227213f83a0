//! A recipe on a model, from its check to what it leaves.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Existing, WriteOptions, check_output, check_room, write, write_json};
use moe_core::{
    Model,
    data::Wave,
    memory,
    train::{JsonLines, Saving, TrainEvent, TrainOptions, train_in_group},
};
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Artifacts, Error, FineTune, MethodConfig, Phase, PhaseEnd, Recipe, Result, Setting, TuningMethod,
    compressed_experts::CompressedLayers,
    condenser::Condensers,
    duo::Duo,
    fold::{Changes, FoldCheck, FoldPrecision, Folded},
    lora::{LoraWeights, Maps, Targets},
    null_experts::NullExperts,
    peft_files,
    recurrent_router::RecurrentRouter,
    trainable::Trainable,
};

/// A step of the loss curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// The step, from 1, counted through all phases.
    pub step: usize,
    /// Mean loss per predicted token.
    pub loss: f64,
}

/// What training cost and gave.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainingCost {
    /// Loss of every step.
    pub losses: Vec<LossPoint>,
    /// Values that were trained at a time, at most.
    pub trained: u64,
    /// Tokens run, prompts included, per second of training; of all processes, if it was resumed.
    pub tokens_per_second: f64,
    /// Largest resident memory of any phase of this process, in bytes.
    pub peak_memory: Option<u64>,
    /// That of each phase, by name. What a method finds out before it trains is among it.
    pub phases: BTreeMap<String, u64>,
}

/// What happens in a run.
#[derive(Debug)]
pub enum RunEvent<'a> {
    /// A phase begins: what exactly will be trained in it.
    Begins {
        /// The phase.
        phase: &'a Phase,
        /// What is trained.
        trainable: &'a Trainable,
    },
    /// Something happened in its training.
    Train {
        /// The phase.
        phase: &'a Phase,
        /// What happened.
        event: &'a TrainEvent,
    },
}

/// Told what happens in a run.
pub type OnRunEvent<'a> = &'a mut dyn FnMut(&RunEvent<'_>) -> Result<()>;

/// Where a recipe is trained.
///
/// In `directory`, `PHASE/` has the saved states of a phase and `PHASE.jsonl` its metrics, every step once, however
/// often it was interrupted.
#[derive(Clone, Copy, Debug)]
pub struct TrainingRun<'a> {
    /// The model.
    pub model: &'a Model,
    /// The rows.
    pub waves: &'a [Wave],
    /// Labels of the sequences of waves, by the wave's id; empty if rows have none.
    pub labels: &'a BTreeMap<u64, Vec<usize>>,
    /// A directory for this run alone.
    pub directory: &'a Path,
    /// Steps between saved states.
    pub save_every: usize,
    /// Whether to go on with what an interrupted run left.
    pub resume: bool,
    /// What quantized weights become that adapters are folded into.
    pub fold: FoldPrecision,
}

/// A trained model.
pub struct Trained {
    /// The model with what was trained.
    pub task: FineTune,
    /// What can be saved besides.
    pub artifacts: Artifacts,
    /// What it cost.
    pub cost: TrainingCost,
    /// What quantized weights become that adapters are folded into.
    pub fold: FoldPrecision,
}

/// What was saved where.
#[derive(Clone, Debug, Default)]
pub struct SavedPaths {
    /// A checkpoint with what was trained folded in, and beside it what cannot be.
    pub model: Option<PathBuf>,
    /// An adapter or mixture.
    pub adapter: Option<PathBuf>,
    /// What is other in the checkpoint than in the base; `changes.json` has it, too.
    pub changes: Option<Changes>,
}

impl TrainingRun<'_> {
    /// The setting of a phase.
    fn setting(&self, recipe: &Recipe) -> Setting<'_> {
        Setting {
            labels: self.labels,
            router_losses: recipe.router_losses,
            waves_per_step: recipe.train.waves_per_step,
            directory: Some(self.directory),
            ..Setting::new(self.model).with_waves(self.waves)
        }
    }

    /// Everything that the recipe, the files and the options show to be wrong, before anything is run or written: the
    /// phases, and what is to be known about what will be written.
    fn check(&self, recipe: &Recipe) -> Result<(Vec<String>, Vec<Phase>)> {
        if self.waves.is_empty() {
            return Err(Error::input("training waves", 0, "at least one"));
        }
        recipe.check(&self.setting(recipe))?;
        if !matches!(recipe.method, MethodConfig::Mixture(_)) {
            let options = WriteOptions { existing: Existing::Force, ..WriteOptions::default() };
            check_output(self.model.checkpoint(), &self.directory.join(MODEL), &options)?;
        }
        let phases = recipe.phases(recipe.train.steps(self.waves.len() - self.held_out(recipe)));
        let mut remarks = Vec::new();
        for (number, phase) in phases.iter().enumerate() {
            self.saving(phase).check()?;
            let mut outline = AdapterSet::new();
            let setting = Setting { phase: number, ..self.setting(recipe) };
            let outlined = recipe.outline(&setting, &mut outline)?;
            let names: Vec<&str> = outline.bank().iter().map(|live| live.name()).collect();
            recipe.train.check_groups(&names)?;
            remarks = self.preflight(&outline, &outlined.artifacts)?;
        }
        Ok((remarks, phases))
    }

    fn saving(&self, phase: &Phase) -> Saving {
        Saving { resume: self.resume, ..Saving::new(self.directory.join(phase.name), self.save_every) }
    }

    /// Waves that are evaluated and not trained on.
    fn held_out(&self, recipe: &Recipe) -> usize {
        match recipe.train.evaluate_every {
            Some(_) if self.waves.len() > 1 => self.waves.len().div_ceil(20),
            _ => 0,
        }
    }

    /// Trains as `recipe` says. If it asks for evaluations, the last twentieth of the waves is evaluated and not
    /// trained on.
    ///
    /// # Errors
    /// What is wrong with the recipe for this model and these rows, with the directory, and with what would be written,
    /// before anything runs; then what stops training.
    pub fn train(&self, recipe: &Recipe, tell: OnRunEvent<'_>) -> Result<Trained> {
        self.train_in_group(&Alone, recipe, tell)
    }

    /// Trains with the other ranks of a group, which all have the same run and recipe, in a directory that all see: the
    /// waves of each step are shared out, and each rank takes the steps of its own parameters. The first one saves
    /// states and metrics, and is told what happens. What comes of it has the same bits on every rank, and for any
    /// number of them.
    ///
    /// # Errors
    /// Those of [`train`](Self::train); those of [`Recipe::check_shareable`]; what has stopped
    /// another rank.
    pub fn train_in_group(&self, group: &dyn Group, recipe: &Recipe, tell: OnRunEvent<'_>) -> Result<Trained> {
        group.agree(self.train_on_this_rank(group, recipe, tell))
    }

    fn train_on_this_rank(&self, group: &dyn Group, recipe: &Recipe, tell: OnRunEvent<'_>) -> Result<Trained> {
        recipe.check_shareable(group.size())?;
        let (remarks, phases) = self.check(recipe)?;
        // Nobody makes the directory while others look what is in it.
        group.check(None)?;
        let mut tell = |event: &RunEvent<'_>| if group.rank() == 0 { tell(event) } else { Ok(()) };
        std::fs::create_dir_all(self.directory).map_err(|source| Error::Io { path: self.directory.into(), source })?;
        let (waves, held_out) = self.waves.split_at(self.waves.len() - self.held_out(recipe));
        let mut cost = TrainingCost::default();
        let (mut tokens, mut seconds) = (0, 0.0);
        let mut setting = Setting { waves, group, ..self.setting(recipe) };
        for (number, phase) in phases.iter().enumerate() {
            memory::reset_peak();
            let mut set = AdapterSet::new();
            let installed = recipe.install(&setting, &mut set)?;
            let mut trainable = Trainable::of(self.model, &set).asked_for(&asked_for(&recipe.method));
            trainable.warnings.extend(remarks.iter().cloned());
            tell(&RunEvent::Begins { phase, trainable: &trainable })?;
            let mut task = FineTune::new(installed.model(self.model), set.into())?.with_evaluation(held_out.to_vec());
            if let Some(hooks) = installed.hooks {
                task = task.with_hooks(hooks);
            }
            let mut options = phase_options(&recipe.train, phase, number);
            options.groups.extend(installed.groups);
            let mut parameters = task.set().bank().parameters()?;
            let saving = self.saving(phase);
            let log = self.directory.join(format!("{}.jsonl", phase.name));
            let mut log = if group.rank() == 0 { Some(JsonLines::create(log)?) } else { None };
            let before = cost.losses.last().map_or(0, |point| point.step);
            let (mut phase_tokens, mut phase_seconds) = (0, 0.0);
            let mut on_event = |event: &TrainEvent| {
                if let TrainEvent::Step { step, loss, tokens_run, seconds, .. } = event {
                    cost.losses.push(LossPoint { step: before + step, loss: *loss });
                    (phase_tokens, phase_seconds) = (*tokens_run, *seconds);
                }
                log.as_mut().map_or(Ok(()), |log| log.write(event))?;
                tell(&RunEvent::Train { phase, event }).map_err(moe_core::Error::observer)
            };
            train_in_group(group, &mut task, &mut parameters, waves, &options, Some(&saving), &mut on_event)?;
            (tokens, seconds) = (tokens + phase_tokens, seconds + phase_seconds);
            if let Some(memory) = memory::process_memory() {
                cost.phases.insert(phase.name.to_owned(), memory.peak);
            }
            cost.trained = parameters.active_len() as u64;
            let artifacts = installed.artifacts;
            if number + 1 == phases.len() {
                task.set().bank().settle(parameters)?;
                // Tenths, which JSON gives back to the bit.
                cost.tokens_per_second = (10.0 * tokens as f64 / f64::max(seconds, 1e-9)).round() / 10.0;
                cost.peak_memory = cost.phases.values().copied().max();
                return Ok(Trained { task, artifacts, cost, fold: self.fold });
            }
            setting = setting.after(PhaseEnd { parameters, artifacts });
        }
        Err(Error::input("phases of the method", 0, "at least one"))
    }

    /// Whether what will be trained can be written, before it is trained; what is to be known about it.
    fn preflight(&self, set: &AdapterSet, artifacts: &Artifacts) -> Result<Vec<String>> {
        if let Some(weights) = artifacts.lora.as_ref().and_then(|lora| lora.weights(ADAPTER_NAME)) {
            let maps = Maps::new(self.model.checkpoint());
            peft_files::check(&weights, &maps, &adapter_options(self.model, &weights, &maps))?;
        }
        if artifacts.mixture.is_some() {
            return Ok(vec!["a mixture depends on its input: it stays beside the weights, as an adapter".into()]);
        }
        let FoldCheck { bytes, remarks } = Folded::check_in_precision(self.model.checkpoint(), set, self.fold)?;
        check_room(&self.directory.join(MODEL), bytes)?;
        Ok(remarks)
    }
}

/// Name of an adapter that has no other.
const ADAPTER_NAME: &str = "default";
/// Directory of an adapter or mixture.
const ADAPTER: &str = "adapter";
/// Directory of the checkpoint.
const MODEL: &str = "model";

fn adapter_options(base: &Model, weights: &LoraWeights, maps: &Maps<'_>) -> peft_files::WriteOptions {
    let base_model = Some(base.checkpoint().dir().display().to_string());
    peft_files::WriteOptions { base_model, ..peft_files::WriteOptions::default() }.fitting(weights, maps)
}

/// The options of a phase. Later ones see the rows in another order, so that they do not begin with the rows of the
/// first again.
fn phase_options(train: &TrainOptions, phase: &Phase, number: usize) -> TrainOptions {
    TrainOptions {
        epochs: train.epochs.max(1),
        max_steps: Some(phase.steps),
        seed: train.seed.wrapping_add(number as u64),
        ..train.clone()
    }
}

/// The names of modules that a method asks for.
fn asked_for(method: &MethodConfig) -> Vec<String> {
    match method {
        MethodConfig::Lora(config) => match &config.target_modules {
            Some(Targets::List(names)) => names.clone(),
            Some(Targets::Pattern(pattern)) => vec![pattern.clone()],
            None => Vec::new(),
        },
        _ => Vec::new(),
    }
}

impl Trained {
    /// What was trained in the weights, packed where it was trained in a format.
    fn folded(&self, base: &Model) -> Result<Folded> {
        match &self.artifacts.packed {
            Some(format) => Folded::on(base.checkpoint(), self.task.set())?.packed(format),
            None => Folded::in_precision(base.checkpoint(), self.task.set(), self.fold),
        }
    }

    /// The model as [`save`](Self::save) writes it, rounded to the dtype of its weights: what is to be measured. `None`
    /// for a mixture, which depends on its input; its model is that of the [task](Self::task).
    ///
    /// # Errors
    /// Those of [`Folded::on`] and [`Folded::run`].
    pub fn as_written(&self, base: &Model, max_memory: Option<u64>) -> Result<Option<Model>> {
        if self.artifacts.mixture.is_some() {
            return Ok(None);
        }
        let folded = self.folded(base)?;
        let model = folded.run(base.device(), max_memory)?.with_precision(base.precision());
        Ok(Some(self.artifacts.beside(&model)?.unwrap_or(model)))
    }

    /// Writes what was trained on `base` into `directory`: `adapter` has a LoRA, as PEFT has it, or a mixture, which no
    /// weights can be; `model` is the checkpoint with all else in its weights, and with the files of compressed experts
    /// and condensers beside it. [`open`](crate::open()) reads all of it.
    ///
    /// # Errors
    /// Those of [`Folded::on`] and of the files.
    pub fn save(&self, base: &Model, directory: &Path, existing: Existing) -> Result<SavedPaths> {
        let (adapter, model) = (directory.join(ADAPTER), directory.join(MODEL));
        let mut saved = SavedPaths::default();
        if let Some(weights) = self.artifacts.lora.as_ref().and_then(|lora| lora.weights(ADAPTER_NAME)) {
            let maps = Maps::new(base.checkpoint());
            peft_files::write(&adapter, &weights, &maps, &adapter_options(base, &weights, &maps))?;
            saved.adapter = Some(adapter.clone());
        }
        if let Some(mixture) = &self.artifacts.mixture {
            mixture.save(&adapter, None)?;
            saved.adapter = Some(adapter);
            return Ok(saved);
        }
        let folded = self.folded(base)?;
        let mut run_time = self.artifacts.run_time();
        // a bias goes into the tensor that a family has for it
        let export = run_time.routing.as_ref().map(|routing| routing.export(base)).transpose()?.flatten();
        let written = match &export {
            Some(export) => export.on(folded.model())?,
            None => folded.model().clone(),
        };
        write(&written, &model, &WriteOptions { existing, ..WriteOptions::default() })?;
        run_time.routing = run_time.routing.filter(|_| export.is_none());
        if !run_time.is_plain() {
            run_time.save_beside(&model)?;
        }
        if let Some(nulls) = &self.artifacts.null_experts {
            nulls.save(model.join(NullExperts::FILE))?;
        }
        if let Some(duo) = &self.artifacts.duo {
            duo.save(model.join(Duo::FILE))?;
        }
        if let Some(router) = &self.artifacts.recurrent_router {
            router.save(model.join(RecurrentRouter::FILE))?;
        }
        if let Some(compressed) = &self.artifacts.compressed {
            compressed.save(model.join(CompressedLayers::FILE))?;
        }
        if let Some(condensers) = &self.artifacts.condensers {
            condensers.save(model.join(Condensers::FILE))?;
        }
        let changes = folded.changes()?;
        write_json(&directory.join("changes.json"), &serde_json::json!(changes))?;
        (saved.model, saved.changes) = (Some(model), Some(changes));
        Ok(saved)
    }
}
