//! One method on one model.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use moe_checkpoint::{Existing, check_output, write};
use moe_core::Model;
use moe_core::data::Wave;
use moe_core::memory;
use moe_core::train::{JsonLines, ParameterGroup, Parameters, Saving, TrainEvent, TrainOptions, train_saved};
use moe_peft::compressed_experts::CompressedLayers;
use moe_peft::dense_mixer::DenseMixer;
use moe_peft::esft::ExpertUse;
use moe_peft::fold::Folded;
use moe_peft::lora::corda::Covariances;
use moe_peft::lora::{Init, Lora, LoraConfig, LoraWeights, Map, Maps, Targets};
use moe_peft::mixture::{KeepsSelection, Mixture};
use moe_peft::model_weights::{BlockWatch, OwnWeights, SampledLayers};
use moe_peft::peft_files::WriteOptions;
use moe_peft::router_loss::RouterLosses;
use moe_peft::trainable::Trainable;
use moe_peft::{AdapterSet, FineTune};
use serde::{Deserialize, Serialize};

use super::recipe::{Compressed, LayerTurns, Method, Recipe};
use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// A step of the loss curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// The step, from 1.
    pub step: usize,
    /// Mean loss per predicted token.
    pub loss: f64,
}

/// What training cost and gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Loss of every step.
    pub losses: Vec<LossPoint>,
    /// Values that were trained at a time, at most.
    pub trained: u64,
    /// Tokens run, prompts included, per second.
    pub tokens_per_second: f64,
    /// Largest resident memory of any phase, in bytes.
    pub peak_memory: Option<u64>,
    /// That of each phase, by name.
    pub phases: BTreeMap<String, u64>,
}

/// A trained model.
pub struct Trained {
    /// The model with what was trained.
    pub task: FineTune,
    /// What it cost.
    pub training: Training,
    /// What was trained beside the weights.
    pub beside: Beside,
}

/// What was trained beside the weights of a model.
#[derive(Debug, Default)]
pub struct Beside {
    /// Low-rank additions.
    pub lora: Option<Lora>,
    /// Mixtures of them.
    pub mixture: Option<Arc<Mixture>>,
    /// Factors of experts that do not run.
    pub compressed: Option<CompressedLayers>,
}

/// Told what will be trained, before the first step.
pub type Show<'a> = &'a mut dyn FnMut(&Trainable) -> Result<()>;

/// What a phase of training starts from.
struct Phase {
    task: FineTune,
    options: TrainOptions,
    name: &'static str,
}

/// Where a method is trained, and how it is watched.
pub struct Workshop<'a> {
    /// The model.
    pub model: &'a Model,
    /// The rows.
    pub waves: &'a [Wave],
    /// The method's directory.
    pub dir: &'a Path,
    /// Steps between saved states.
    pub save_every: usize,
    /// Take saved states up.
    pub resume: bool,
    /// Progress bars.
    pub progress: Progress,
}

impl Workshop<'_> {
    /// Trains as `recipe` says. States and metrics go into the directory.
    ///
    /// # Errors
    /// What is wrong with the recipe, before any step; then what stops training.
    pub fn train(&self, name: &str, recipe: &Recipe, show: Show<'_>) -> Result<Trained> {
        recipe.train.validate()?;
        let mut run = Run::new(self, name, recipe)?;
        match &recipe.method {
            Method::Smt(smt) => {
                smt.validate()?;
                let mut set = AdapterSet::new();
                smt.warmup_weights().attach(self.model, &mut set)?;
                let remarks = self.preflight(&set, &Beside::default())?;
                let watch = BlockWatch::new(*smt, self.model)?;
                let task = FineTune::new(self.model, Arc::new(set))?.with_hooks(watch.clone());
                let steps = recipe.train.steps(self.waves.len());
                let warmup = smt.warmup_steps.min(steps.saturating_sub(1)).max(1);
                let options = TrainOptions { max_steps: Some(warmup), ..recipe.train.clone() };
                let (_, warmed) = run.phase(Phase { task, options, name: "warm-up" })?;
                let selection = watch.scores().select()?;
                let mut set = AdapterSet::new();
                smt.attach(self.model, &selection, Some(warmed), &mut set)?;
                let task = FineTune::new(self.model, Arc::new(set))?;
                let options = TrainOptions { max_steps: Some((steps - warmup).max(1)), ..recipe.train.clone() };
                run.finish(Phase { task, options, name: "blocks" }, remarks, show)
            }
            method => {
                let (task, options, beside) = self.single(method, recipe)?;
                let remarks = self.preflight(task.set(), &beside)?;
                Ok(Trained { beside, ..run.finish(Phase { task, options, name: "state" }, remarks, show)? })
            }
        }
    }

    /// A method of one phase.
    fn single(&self, method: &Method, recipe: &Recipe) -> Result<(FineTune, TrainOptions, Beside)> {
        let mut options = recipe.train.clone();
        let mut set = AdapterSet::new();
        let (mut turns, mut beside) = (None, Beside::default());
        match method {
            Method::Own(weights) => weights.attach(self.model, &mut set)?,
            Method::Full => OwnWeights::full().attach(self.model, &mut set)?,
            Method::Esft(esft) => {
                esft.validate()?;
                let selection = esft.select(&ExpertUse::collect(self.model, self.waves)?)?;
                selection.weights().attach(self.model, &mut set)?;
            }
            Method::Layers(LayerTurns { sampling, projection }) => {
                let probabilities = sampling.probabilities(self.model, &self.waves[..self.waves.len().min(4)])?;
                OwnWeights::full().attach(self.model, &mut set)?;
                turns = Some(SampledLayers::new(sampling.clone(), probabilities));
                if projection.is_some() {
                    for map in ["query", "key", "value", "output", "*gate_up", "*down"] {
                        let pattern = format!("layers.*.{map}");
                        let (projection, later) = (*projection, true);
                        options.groups.push(ParameterGroup { pattern, projection, later, ..ParameterGroup::default() });
                    }
                }
            }
            Method::Lora(config) => {
                let maps = Maps::new(self.model.checkpoint());
                let covariances = match config.init_lora_weights {
                    Init::Corda(_) => Some(self.covariances(config, &maps)?),
                    _ => None,
                };
                let weights = config.init(&maps, covariances.as_ref())?;
                beside.lora = Some(Lora::install(&mut set, &maps, &[("default", weights)], self.model.device())?);
            }
            Method::Mixture(config) => {
                let maps = Maps::new(self.model.checkpoint());
                let mixture = Mixture::install(config, &mut set, &maps, self.model.device())?;
                beside.mixture = Some(Arc::new(mixture));
            }
            Method::CompressedExperts(Compressed { experts, own }) => {
                if *own != OwnWeights::default() {
                    own.attach(self.model, &mut set)?;
                }
                beside.compressed = Some(experts.attach(self.model, &mut set)?);
            }
            Method::Smt(_) => return Err(Error::Invalid("two phases".into())),
        }
        if recipe.router_losses != RouterLosses::default() {
            recipe.router_losses.attach(self.model, &mut set)?;
        }
        if recipe.dense_mixer {
            DenseMixer {}.attach(self.model, &mut set)?;
        }
        let task = FineTune::new(self.model, Arc::new(set))?;
        let task = match (turns, &beside.mixture) {
            (Some(turns), _) => task.with_hooks(turns),
            (None, Some(mixture)) => task.with_hooks(KeepsSelection(mixture.clone())),
            (None, None) => task,
        };
        Ok((task, options, beside))
    }

    /// Covariances of the inputs of what is adapted, on the first rows.
    fn covariances(&self, config: &LoraConfig, maps: &Maps<'_>) -> Result<Covariances> {
        let targets: Vec<Map> = config.targets(maps)?.into_keys().collect();
        Ok(Covariances::collect(self.model, &self.waves[..self.waves.len().min(16)], &targets)?)
    }

    /// Whether what will be trained can be written, before it is trained; what is to be known about it.
    fn preflight(&self, set: &AdapterSet, beside: &Beside) -> Result<Vec<String>> {
        if let Some(weights) = beside.lora.as_ref().and_then(|lora| lora.weights("default")) {
            let maps = Maps::new(self.model.checkpoint());
            moe_peft::peft_files::check(&weights, &maps, &self.adapter_options(&weights, &maps))?;
        }
        if beside.mixture.is_some() {
            return Ok(vec!["a mixture depends on its input: it stays beside the weights, as an adapter".into()]);
        }
        let folded = Folded::check(self.model.checkpoint(), set)?;
        let options = moe_checkpoint::WriteOptions { existing: Existing::Force, ..Default::default() };
        check_output(self.model.checkpoint(), &self.dir.join("model"), &options)?;
        Ok(folded.remarks)
    }

    fn adapter_options(&self, weights: &LoraWeights, maps: &Maps<'_>) -> WriteOptions {
        let base_model = Some(self.model.checkpoint().dir().display().to_string());
        WriteOptions { base_model, ..WriteOptions::default() }.fitting(weights, maps)
    }

    /// The model with what was trained in its weights, as it is written: what is to be measured. `None` for a mixture, which depends on its
    /// input.
    ///
    /// # Errors
    /// Those of [`Folded::on`].
    pub fn fold(&self, trained: &Trained) -> Result<Option<Folded>> {
        match trained.beside.mixture {
            Some(_) => Ok(None),
            None => Ok(Some(Folded::on(self.model.checkpoint(), trained.task.set())?)),
        }
    }

    /// Writes what was trained: the adapter, and the model with it.
    ///
    /// # Errors
    /// Those of [`write`].
    pub fn write(&self, trained: &Trained, folded: Option<&Folded>, existing: Existing) -> Result<()> {
        if let Some(weights) = trained.beside.lora.as_ref().and_then(|lora| lora.weights("default")) {
            let maps = Maps::new(self.model.checkpoint());
            let options = self.adapter_options(&weights, &maps);
            moe_peft::peft_files::write(self.dir.join("adapter"), &weights, &maps, &options)?;
        }
        if let Some(mixture) = &trained.beside.mixture {
            mixture.save(self.dir.join("adapter"), None)?;
        }
        let Some(folded) = folded else { return Ok(()) };
        let options = moe_checkpoint::WriteOptions { existing, ..Default::default() };
        let model = self.dir.join("model");
        write(folded.model(), &model, &options)?;
        if let Some(compressed) = &trained.beside.compressed {
            compressed.save(model.join("compressed_experts.safetensors"))?;
        }
        let changes = folded.changes()?;
        let json = serde_json::to_vec_pretty(&changes).unwrap_or_default();
        moe_checkpoint::write_atomic(self.dir.join("changes.json"), &json)?;
        self.progress.say(&format!("{}: {changes}", model.display()));
        Ok(())
    }
}

/// Phases of a training one after the other.
struct Run<'a> {
    shop: &'a Workshop<'a>,
    name: &'a str,
    losses: Vec<LossPoint>,
    seconds: f64,
    tokens: u64,
    peaks: BTreeMap<String, u64>,
    recipe: &'a Recipe,
    /// Waves that are trained on, and those that are only evaluated.
    waves: (&'a [Wave], &'a [Wave]),
}

impl<'a> Run<'a> {
    fn new(shop: &'a Workshop<'a>, name: &'a str, recipe: &'a Recipe) -> Result<Self> {
        // evaluation while it trains is on rows that it does not train on: the last twentieth
        let held_out = match recipe.train.evaluate_every {
            Some(_) if shop.waves.len() > 1 => shop.waves.len().div_ceil(20),
            _ => 0,
        };
        let waves = shop.waves.split_at(shop.waves.len() - held_out);
        std::fs::create_dir_all(shop.dir).map_err(Error::io(shop.dir))?;
        Ok(Self { shop, name, losses: Vec::new(), seconds: 0.0, tokens: 0, peaks: BTreeMap::new(), recipe, waves })
    }

    fn phase(&mut self, phase: Phase) -> Result<(FineTune, Parameters)> {
        let Phase { task, options, name } = phase;
        let (waves, held_out) = self.waves;
        let mut task = task.with_evaluation(held_out.to_vec());
        let mut parameters = task.set().bank().parameters()?;
        let saving = Saving { resume: self.shop.resume, ..Saving::new(self.shop.dir.join(name), self.shop.save_every) };
        memory::reset_peak();
        let start = Instant::now();
        // up to the last step: what is saved afterwards is no training
        let mut seconds = 0.0;
        let bar = self.shop.progress.bar(self.name, options.steps(waves.len()) as u64, Unit::Count("steps"));
        let metrics = self.shop.dir.join(format!("{name}.jsonl"));
        let log = File::options().create(true).append(true).open(&metrics).map_err(Error::io(&metrics))?;
        let mut log = JsonLines(log);
        let mut steps = 0;
        let mut tell = |event: &TrainEvent| {
            if let TrainEvent::Step { step, loss, .. } = event {
                bar.at(*step as u64);
                bar.label(format!("{}: loss {loss:.3}", self.name));
                steps += 1;
                seconds = start.elapsed().as_secs_f64();
            }
            log.write(event)
        };
        train_saved(&mut task, &mut parameters, waves, &options, Some(&saving), &mut tell)?;
        self.seconds += seconds;
        if let Some(memory) = memory::process_memory() {
            self.peaks.insert(name.to_owned(), memory.peak);
        }
        let offset = self.losses.last().map_or(0, |point| point.step);
        self.losses.extend(losses(&metrics)?.into_iter().map(|(step, loss)| LossPoint { step: offset + step, loss }));
        let per_epoch: usize = waves.iter().map(Wave::tokens).sum();
        self.tokens += steps * per_epoch as u64 * options.waves_per_step as u64 / waves.len().max(1) as u64;
        Ok((task, parameters))
    }

    fn finish(mut self, phase: Phase, remarks: Vec<String>, show: Show<'_>) -> Result<Trained> {
        let asked: Vec<String> = match &self.recipe.method {
            Method::Lora(config) => match &config.target_modules {
                Some(Targets::List(names)) => names.clone(),
                Some(Targets::Pattern(pattern)) => vec![pattern.clone()],
                None => Vec::new(),
            },
            _ => Vec::new(),
        };
        let mut trainable = Trainable::of(self.shop.model, phase.task.set()).asked_for(&asked);
        trainable.warnings.extend(remarks);
        show(&trainable)?;
        let (task, parameters) = self.phase(phase)?;
        let trained = parameters.active_len() as u64;
        task.set().bank().settle(parameters)?;
        let training = Training {
            losses: self.losses,
            trained,
            tokens_per_second: self.tokens as f64 / self.seconds.max(1e-9),
            peak_memory: self.peaks.values().copied().max(),
            phases: self.peaks,
        };
        Ok(Trained { task, training, beside: Beside::default() })
    }
}

/// The loss of every step in a file of metrics; of a step that was taken again after an interruption, the last.
fn losses(path: &Path) -> Result<BTreeMap<usize, f64>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let events = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    Ok(events
        .filter_map(|event| match event {
            TrainEvent::Step { step, loss, .. } => Some((step, loss)),
            _ => None,
        })
        .collect())
}
