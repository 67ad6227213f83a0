//! Fine-tuning by several methods, side by side: what `finetune_qwen` runs.

mod arguments;
mod recipe;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use moe::jobs;
use moe::recipe::{Named, TrainingChanges, Tune};
use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Checkpoint, Existing, WriteOptions, write, write_atomic};
use moe_core::Model;
use moe_core::data::{Dataset, DatasetOptions, EvalRows, EvalSet, LossOver, Source, Tokenizer, Wave, WaveOptions};
use moe_core::decode::Decoding;
use moe_core::evaluate::{EvaluateOptions, Evaluation, evaluate_in_group};
use moe_importance::{Calibration, Scorer, scorers::Fisher};
use moe_peft::{METHODS, Recipe, Setting, TrainingCost, TrainingRun, TuningMethod};
use moe_prune::{Budget, ProtectionMask, PruneForm, PruneOptions, Pruner, Scope, SharedSets, UnitPruner};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use arguments::{Arguments, DEFAULT_OUT};
pub use recipe::{DEFAULT_METHODS, named};

use crate::progress::{Progress, Unit};
use crate::{Error, Result};
use moe::out_dir::{Existing as OutExisting, OutDir};

/// What a method did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodResult {
    /// Its name.
    pub name: String,
    /// What it is.
    pub recipe: Recipe,
    /// What it measures afterwards.
    pub evaluations: Vec<Evaluation>,
    /// What it cost.
    pub training: TrainingCost,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The model.
    pub model: PathBuf,
    /// Training rows, tokens in them, and tokens that count in the loss.
    pub data: [u64; 3],
    /// Rows that were left out since nothing of them counts in the loss within `--length`, and rows that lost their end
    /// there.
    #[serde(default)]
    pub left_out: [u64; 2],
    /// The model before training; after pruning, if it was pruned first.
    pub before: Vec<Evaluation>,
    /// The whole model, if it was pruned first.
    pub whole: Option<Vec<Evaluation>>,
    /// The methods.
    pub methods: Vec<MethodResult>,
}

/// A finished run.
#[derive(Debug)]
pub struct Finished {
    /// What was found.
    pub results: Results,
    /// Tables and remarks for a terminal.
    pub text: String,
}

/// A checked command line.
struct Job {
    arguments: Arguments,
    recipes: Vec<(String, Recipe)>,
    out: OutDir,
    existing: OutExisting,
    tokenizer: Option<Tokenizer>,
    data: Dataset,
    evals: Vec<EvalSet>,
    model: Model,
}

impl Job {
    fn new(arguments: Arguments) -> Result<Self> {
        let recipes = recipes(&arguments)?;
        let existing = match (arguments.resume, arguments.force || arguments.out.is_none()) {
            (true, _) => OutExisting::Resume,
            (_, true) => OutExisting::Replace,
            _ => OutExisting::Refuse,
        };
        let out = OutDir::check(&arguments.out_dir(), existing)?;
        let device = moe_core::device::device(&arguments.device)?;
        let checkpoint = Arc::new(Checkpoint::open(arguments.model_dir())?);
        // Half of the units are chosen and dropped at the precision of the checkpoint.
        let model = match arguments.recover {
            true => Model::new(checkpoint, &device, arguments.max_memory)?,
            false => jobs::trained_on(&checkpoint, arguments.base_precision, &device, arguments.max_memory)?,
        };
        let model = model.with_precision(arguments.precision);
        let files = arguments.data_files()?;
        let tokenizer = match arguments.model_dir().join("tokenizer.json").exists() {
            true => Some(Tokenizer::from_dir(arguments.model_dir())?),
            false => None,
        };
        let labels = label_field(&recipes)?;
        let load = |(files, text): &(Vec<Source>, bool)| {
            let options = DatasetOptions {
                samples: Some(arguments.samples),
                length: arguments.length,
                seed: Some(arguments.seed.unwrap_or(0)),
                label: labels.clone(),
                loss: if arguments.loss_over_prompts || *text { LossOver::All } else { LossOver::Completions },
                // A model that never saw an answer end does not end its own.
                end_completions: !arguments.no_eos,
                reading: arguments.rows.reading(),
                ..DatasetOptions::default()
            };
            let data = Dataset::load_sources(files, tokenizer.as_ref(), model.config().vocab_size, &options)?;
            files.iter().for_each(|file| crate::cli::left_out(&file.path, &data));
            Ok::<_, moe_core::data::Error>(data)
        };
        let mut data = files.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let data = match data.len() {
            1 => data.remove(0),
            _ => {
                let (dropped, cut) = data.iter().fold((0, 0), |(d, c), data| (d + data.dropped, c + data.cut));
                let all = Dataset::from_sequences(data.into_iter().flat_map(|data| data.sequences).collect());
                Dataset { dropped: dropped + all.dropped, cut, ..all }
            }
        };
        let eval = |path: &PathBuf| -> Result<EvalSet> {
            let no_tokenizer = || Error::Usage("--eval needs a model with a tokenizer.json".into());
            let tokenizer = tokenizer.as_ref().ok_or_else(no_tokenizer)?;
            Ok(EvalSet::load(path, tokenizer, model.config().vocab_size, Some(arguments.eval_rows))?)
        };
        let evals = arguments.eval_files().iter().map(eval).collect::<Result<Vec<_>>>()?;
        let job = Self { recipes, out, existing, tokenizer, data, evals, model, arguments };
        let waves = job.waves();
        let labels = job.labels(&waves);
        for (_, recipe) in &job.recipes {
            let mut setting = Setting::new(&job.model).with_waves(&waves);
            setting.labels = &labels;
            recipe.check(&setting)?;
        }
        if existing == OutExisting::Resume {
            job.out.check_resumable(&job.recipe())?;
        }
        Ok(job)
    }

    fn recipe(&self) -> serde_json::Value {
        let methods: serde_json::Map<_, _> =
            self.recipes.iter().map(|(name, recipe)| (name.clone(), json!(recipe))).collect();
        json!({
            "program": "finetune_qwen",
            "crate_version": env!("CARGO_PKG_VERSION"),
            "model_fingerprint": self.model.checkpoint().fingerprint(),
            "calibration": { "hash": self.data.hash, "wave_tokens": self.arguments.step_tokens },
            "recover": self.arguments.recover,
            "base_precision": self.arguments.base_precision,
            "fold": self.arguments.fold,
            "methods": methods,
        })
    }

    fn waves(&self) -> Vec<Wave> {
        self.data.waves(WaveOptions::Tokens(self.arguments.step_tokens))
    }

    /// Labels of the rows of each wave.
    fn labels(&self, waves: &[Wave]) -> BTreeMap<u64, Vec<usize>> {
        self.data.labels_of(waves)
    }

    /// What a model measures. Of a group all ranks share likelihoods out; the first generates answers, and has all.
    fn measure(&self, model: &Model, label: &str, group: &dyn Group, progress: Progress) -> Result<Vec<Evaluation>> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(Vec::new()) };
        let bar = progress.bar(format!("measuring {label}"), self.evals.len() as u64, Unit::Count("files"));
        let mut evaluations = Vec::new();
        for set in &self.evals {
            let (how, plain) = (EvaluateOptions::default(), Decoding::default());
            let generates = matches!(set.rows, EvalRows::Exact(_));
            if group.rank() == 0 || !generates {
                let who: &dyn Group = if generates { &Alone } else { group };
                evaluations.push(evaluate_in_group(who, model, tokenizer, set, &how, &plain)?.0);
            }
            bar.step();
        }
        Ok(evaluations)
    }
}

/// The methods of a command line, with what it changes of them.
fn recipes(arguments: &Arguments) -> Result<Vec<(String, Recipe)>> {
    let names: Vec<String> = match (arguments.method.is_empty(), arguments.model.is_some()) {
        (false, _) => arguments.method.concat(),
        (true, false) => DEFAULT_METHODS.iter().map(|name| (*name).to_owned()).collect(),
        (true, true) => Vec::new(),
    };
    let mut recipes = match &arguments.recipe {
        Some(named) => vec![("recipe".to_owned(), Tune::new(named.clone()).recipe(0)?)],
        None => {
            let bundled = arguments.model.is_none();
            names.into_iter().map(|name| of_method(&name, bundled)).collect::<Result<_>>()?
        }
    };
    if recipes.is_empty() {
        return Err(Error::Usage("--model needs --method NAME (`--method list` prints them) or --recipe FILE".into()));
    }
    let count = |given: Option<std::num::NonZeroUsize>| given.map(Into::into);
    let changes = TrainingChanges {
        steps: count(arguments.steps),
        epochs: count(arguments.epochs),
        learning_rate: arguments.learning_rate,
        warmup: arguments.warmup,
        decay: arguments.decay,
        accumulate: count(arguments.accumulate),
        evaluate_every: count(arguments.evaluate_every),
        patience: count(arguments.patience),
    };
    for (_, recipe) in &mut recipes {
        changes.apply(&mut recipe.train)?;
        if let Some(seed) = arguments.seed {
            recipe.set_seed(seed);
        }
        if arguments.labels.is_some() {
            recipe.labels = arguments.labels.clone();
        }
    }
    Ok(recipes)
}

/// A method that was named or given as JSON, and what its directory is called.
fn of_method(name: &str, bundled: bool) -> Result<(String, Recipe)> {
    if !name.trim_start().starts_with('{') {
        return Ok((directory_name(name), named(name, bundled)?));
    }
    let method = Named::parse(name).map_err(|error| Error::Usage(format!("--method: {error}")))?;
    let called = method.object("type").get("type").and_then(|name| name.as_str()).unwrap_or("own").to_string();
    Ok((called, Tune::new(method).recipe(0)?))
}

/// The name of a method as that of its directory: of a file without its folders and extension.
fn directory_name(method: &str) -> String {
    let file = method.ends_with(".json").then(|| std::path::Path::new(method).file_stem());
    file.flatten().map_or_else(|| method.to_owned(), |stem| stem.to_string_lossy().into_owned())
}

/// The field of labels that recipes ask for.
fn label_field(recipes: &[(String, Recipe)]) -> Result<Option<String>> {
    let fields: BTreeSet<&String> = recipes.iter().filter_map(|(_, recipe)| recipe.labels.as_ref()).collect();
    match fields.len() {
        0 | 1 => Ok(fields.into_iter().next().cloned()),
        _ => Err(Error::Usage(format!("labels: found {fields:?}, expected one field for all methods of a run"))),
    }
}

/// The methods that have a name.
pub fn list() -> String {
    let mut table = crate::table::Table::new(["method", "trains", "highest learning rate", "source"], 2);
    for method in METHODS {
        let rate = named(method.name, false).map_or(f64::NAN, |recipe| recipe.train.schedule.peak);
        table.row([method.name.to_owned(), method.words.to_owned(), format!("{rate:e}"), method.source.to_owned()]);
    }
    format!("{}\nRates are the published ones; the bundled model is trained at larger ones.\n", table.to_text())
}

/// Runs it and gives what is printed: a table, JSON if it was asked for, or the methods for `--method list`.
///
/// # Errors
/// Those of [`run`].
pub fn print(arguments: Arguments, progress: Progress) -> Result<String> {
    print_in_group(arguments, &Alone, progress)
}

/// As [`print()`], with the other ranks of a group; what the first of them prints.
///
/// # Errors
/// Those of [`run_in_group`].
pub fn print_in_group(arguments: Arguments, group: &dyn Group, progress: Progress) -> Result<String> {
    if arguments.method.iter().flatten().any(|name| name == "list") {
        return Ok(list());
    }
    let json = arguments.json;
    let finished = run_in_group(arguments, group, progress)?;
    Ok(if json { format!("{}\n", json!(finished.results)) } else { finished.text })
}

/// Runs it all. Everything that can be wrong with the arguments is found before any work is done and anything written.
///
/// # Errors
/// What is wrong, or what stopped the work; `--resume` goes on from there.
pub fn run(arguments: Arguments, progress: Progress) -> Result<Finished> {
    run_in_group(arguments, &Alone, progress)
}

/// As [`run`], with the other ranks of a group, which all have the same arguments and see the same output directory.
/// They train and measure together; the first writes.
///
/// # Errors
/// Those of [`run`]; what is [not shared out](Recipe::check_shareable); what has stopped another rank.
pub fn run_in_group(arguments: Arguments, group: &dyn Group, progress: Progress) -> Result<Finished> {
    let first = group.rank() == 0;
    if group.size() > 1 && arguments.recover {
        return Err(Error::Usage(format!("--recover: found {} processes, expected one", group.size())));
    }
    let mut job = Job::new(arguments)?;
    job.recipes.iter().try_for_each(|(_, recipe)| recipe.check_shareable(group.size()))?;
    if job.arguments.recover {
        halving(&job).check(job.model.checkpoint())?;
    }
    // All have looked at what is there before anything is made.
    group.check(None)?;
    if first {
        job.out.open(job.existing, &job.recipe())?;
    }
    group.check(None)?;
    if let Some(text) = report::left_out(&job.data, job.arguments.length) {
        progress.say(&text);
    }
    let mut before = job.measure(&job.model, "the model", group, progress)?;
    let mut whole = None;
    if job.arguments.recover {
        job.model = halved(&job)?;
        whole = Some(std::mem::replace(&mut before, job.measure(&job.model, "what is left", group, progress)?));
    }
    let waves = job.waves();
    let labels = job.labels(&waves);
    let mut methods = Vec::new();
    for (name, recipe) in &job.recipes {
        let dir = job.out.root().join(name);
        let done = dir.join("result.json");
        let finished = std::fs::read(&done).ok().and_then(|bytes| serde_json::from_slice::<MethodResult>(&bytes).ok());
        // What the first rank finds counts for all.
        let skipped = group.broadcast(0, vec![u8::from(finished.is_some())])? == [1];
        if !first && skipped {
            continue;
        }
        if let Some(result) = finished.filter(|_| skipped) {
            if result.recipe != *recipe {
                return Err(Error::Invalid(format!(
                    "{}: --resume goes on with the same run, but this was trained by another recipe; repeat its arguments, \
                     choose another --out, or --force",
                    done.display()
                )));
            }
            methods.push(result);
            continue;
        }
        let training = TrainingRun {
            model: &job.model,
            waves: &waves,
            labels: &labels,
            directory: &dir,
            save_every: job.arguments.save_every.get(),
            resume: job.existing == OutExisting::Resume,
            fold: job.arguments.fold,
        };
        // Several methods side by side would fill the screen; their tables are in their directories.
        let told = job.recipes.len() == 1;
        let trained = jobs::train(&training, recipe, name, told, group, progress)?;
        // What is measured is what is written, rounded to the dtype of the weights.
        let written = trained.as_written(&job.model, job.arguments.max_memory)?;
        let evaluations = job.measure(written.as_ref().unwrap_or(trained.task.model()), name, group, progress)?;
        if !first {
            continue;
        }
        let saved = jobs::save(&training, recipe, &trained)?;
        if let (Some(path), Some(changes)) = (&saved.model, &saved.changes) {
            progress.say(&format!("{}: {changes}", path.display()));
        }
        let result = MethodResult { name: name.clone(), recipe: recipe.clone(), evaluations, training: trained.cost };
        write_atomic(done, &serde_json::to_vec_pretty(&result).unwrap_or_default())?;
        methods.push(result);
    }
    let data = [job.data.sequences.len() as u64, job.data.tokens() as u64, job.data.loss_tokens() as u64];
    let left_out = [job.data.dropped as u64, job.data.cut as u64];
    let results = Results { model: job.arguments.model_dir(), data, left_out, before, whole, methods };
    if !first {
        return Ok(Finished { results, text: String::new() });
    }
    report::page(&results)?.write(job.out.report())?;
    job.out.finish(&json!(results))?;
    let markdown = report::table(&results).to_markdown();
    write_atomic(job.out.root().join("table.md"), markdown.as_bytes())?;
    let text = report::text(&results, job.out.root());
    Ok(Finished { results, text })
}

/// What half of a model is made of.
fn halving(job: &Job) -> PruneOptions<'static> {
    PruneOptions { mtp: job.arguments.mtp, ..PruneOptions::new(PruneForm::Uniform) }
}

/// The model with half of the units of its routed experts, those with the highest Fisher scores on the training rows,
/// at one width for all experts: what a stock loader would get.
fn halved(job: &Job) -> Result<Model> {
    let checkpoint = job.model.checkpoint();
    let dir = job.out.root().join("half");
    if !dir.exists() {
        let scorer = Fisher::default();
        let calibration =
            Calibration::new(&job.model, &job.data, WaveOptions::default()).scorers([&scorer as &dyn Scorer]);
        let statistics = calibration.store(job.out.root().join("half_statistics")).run(&mut |_| ())?;
        let scores = scorer.score(&statistics, checkpoint.as_ref())?;
        let pruner = UnitPruner::new(Scope::Expert);
        let (half, none) = (Budget::Ratio(0.5), ProtectionMask::none());
        let plan = match SharedSets::of(checkpoint) {
            Some(shared) => shared.prune(&pruner, &scores, half, &none)?,
            None => pruner.prune(&scores, checkpoint.shape(), half, &none)?.plan,
        };
        let existing = if job.arguments.resume { Existing::Resume } else { Existing::Refuse };
        write(
            plan.on(checkpoint, &halving(job))?.model(),
            &dir,
            &WriteOptions { existing, ..WriteOptions::default() },
        )?;
    }
    let Arguments { base_precision, max_memory, precision, .. } = job.arguments;
    let model = jobs::trained_on(&Arc::new(Checkpoint::open(dir)?), base_precision, job.model.device(), max_memory)?;
    Ok(model.with_precision(precision))
}
