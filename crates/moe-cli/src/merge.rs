//! Evidence from calibration data, a merge plan, a merged checkpoint, and what it lost.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use moe::jobs::{Merged, Merging, train_parts};
use moe::recipe::{Merge, Named, TrainingChanges};
use moe_checkpoint::group::Group;
use moe_checkpoint::{Checkpoint, Dtype, Existing, Mtp, OutputDir, ProtectionMask, WriteOptions, check_space, write};
use moe_core::data::{Source, Tokenizer, Wave};
use moe_core::train::TrainReport;
use moe_core::{Engine, EngineOptions, Model, Precision, TeacherLogits, evaluate};
use moe_merge::{Amount, CompactModel, CompactReport, CompactTraining, MergeReport, OutputForm, Recipe};
use moe_prune::Budget;
use serde::Serialize;

use crate::progress::Progress;
use crate::{Error, Result, cli, format};

/// Merges routed experts of a checkpoint
#[derive(Clone, Debug, Parser)]
#[command(after_help = format!(
    "Examples:\n  moe merge --model DIR --data rows.jsonl --recipe hc-smoe --ratio 0.25 --form stock --out OUT\n  \
moe merge --model DIR --data rows.jsonl --recipe ream --experts-per-layer 48 --work evidence --plan-only --out OUT\n  \
moe merge --model DIR --data rows.jsonl --recipe mc-smoe --train --epochs 2 --form grouped --dense DENSE --out OUT\n\nRecipes: {}",
    Recipe::names().collect::<Vec<_>>().join(", ")
))]
pub struct Arguments {
    /// Directory of a Hugging Face checkpoint
    #[arg(long)]
    pub model: PathBuf,
    /// What evidence is collected on
    #[command(flatten)]
    pub data: cli::DataArguments,
    /// A published method by name, or a recipe as JSON or a JSON file
    #[arg(long, value_name = "NAME|JSON|FILE", value_parser = Named::parse)]
    pub recipe: Named,
    /// Fraction of the experts to merge away; without it, as many as the recipe says (half, in a published one)
    #[arg(long, value_parser = cli::ratio, group = "budget")]
    pub ratio: Option<f64>,
    /// Experts that are left in every layer, or on average where the recipe shares its budget over layers
    #[arg(long, value_name = "N", value_parser = cli::at_least(1), group = "budget")]
    pub experts_per_layer: Option<usize>,
    /// Parameters of routed experts to keep, at most: as many whole experts as they make
    #[arg(long, value_name = "N", group = "budget")]
    pub keep_parameters: Option<u64>,
    /// Bytes of the whole checkpoint to keep, at most, such as 24GB: as many whole experts as they make
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes, group = "budget")]
    pub keep_bytes: Option<u64>,
    /// stock, grouped or stock-copies [default: stock where the recipe leaves as many experts in every layer, else
    /// grouped, which these crates read]
    #[arg(long)]
    pub form: Option<OutputForm>,
    /// New directory for the merged checkpoint; its plan and a report go beside it, as OUT.plan.json and
    /// OUT.report.html
    #[arg(long)]
    pub out: PathBuf,
    /// Merge all layers on one pass, even if the recipe goes layer by layer
    #[arg(long)]
    pub at_once: bool,
    /// Experts that nothing may change, as moe score --super-experts writes them
    #[arg(long, value_name = "FILE")]
    pub protect: Option<PathBuf>,
    /// Plan only: OUT.plan.json and the evidence (--work, or OUT.work) are written, and no model
    #[arg(long)]
    pub plan_only: bool,
    /// Check everything and do nothing
    #[arg(long)]
    pub check: bool,
    /// Rows to measure the divergence from the original model on
    #[arg(long)]
    pub test: Option<PathBuf>,
    /// Layers that predict further tokens: keep or drop
    #[arg(long, value_parser = crate::prune::mtp)]
    pub mtp: Option<Mtp>,
    /// Directory for the evidence and the merged experts, which stays: another form or budget reuses what it can;
    /// without it, OUT.work, which goes when all is written
    #[arg(long)]
    pub work: Option<PathBuf>,
    /// Train the low-rank and sparse parts of the merged experts on the rows, towards the model before (MC-SMoE): as
    /// published, or with settings as JSON or a JSON file. They are in OUT.compact
    #[arg(long, value_name = "JSON|FILE", num_args = 0..=1, default_missing_value = "{}", value_parser = Named::parse)]
    pub train: Option<Named>,
    /// Steps of that training, instead of those of its settings
    #[arg(long, value_name = "STEPS", requires = "train", value_parser = cli::at_least(1))]
    pub steps: Option<usize>,
    /// Passes of that training over the rows, instead of those of its settings
    #[arg(long, value_name = "N", requires = "train", conflicts_with = "steps", value_parser = cli::at_least(1))]
    pub epochs: Option<usize>,
    /// Highest learning rate of that training, instead of that of its settings
    #[arg(long, value_name = "RATE", requires = "train")]
    pub learning_rate: Option<f64>,
    /// New directory for the model with compressed experts as a plain checkpoint, if they are compressed
    #[arg(long)]
    pub dense: Option<PathBuf>,
    /// Tokens of each layer that alignments and least squares see
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(1))]
    pub sample: usize,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// f32, or bf16: activations are rounded once per product, where the processor multiplies pairs of bf16
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: Precision,
    /// Go on with an output that an earlier run left unfinished
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace an output that exists, and start over what an earlier run left
    #[arg(long)]
    pub force: bool,
    /// How the evidence is shared with other processes, each with a --work of its own: --absorb names those
    #[command(flatten)]
    pub share: cli::ShareArguments,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What a run did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What became of the experts.
    pub merge: MergeReport,
    /// Tokens calibrated on.
    pub tokens: usize,
    /// Seconds of running the model.
    pub collect_seconds: f64,
    /// Seconds of planning and writing, or of merging layer by layer with the runs in between.
    pub merge_seconds: f64,
    /// What compressing the merged experts did, if they were compressed: they are in OUT.compact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact: Option<CompactReport>,
    /// How training their parts went, if they were trained; its figure is the loss per token on a twentieth of the
    /// rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainReport>,
    /// Cross-entropy of the test rows before and after, and the divergence KL(before || after), in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<Loss>,
}

/// What a merge lost on the test rows, in nats per token.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Loss {
    /// Cross-entropy before.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// KL(before || after).
    pub divergence: f64,
}

impl Loss {
    /// The figures for a model's card.
    fn measured(&self) -> Vec<(String, String)> {
        let figures = [
            ("nats per token before", self.before),
            ("nats per token", self.after),
            ("KL from before", self.divergence),
        ];
        figures.map(|(name, value)| (name.to_string(), format!("{value:.4}"))).into()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.merge)?;
        let Self { tokens, collect_seconds, merge_seconds, .. } = self;
        writeln!(f, "{tokens} tokens; {collect_seconds:.1} s of collecting, {merge_seconds:.1} s of merging")?;
        if let Some(compact) = &self.compact {
            let (before, after) = (format::size(compact.bytes_before), format::size(compact.bytes_after));
            writeln!(f, "experts compressed: {before} -> {after}")?;
        }
        if let Some(TrainReport { steps, before: Some(before), best: Some(best), .. }) = &self.training {
            writeln!(f, "parts trained: {steps} steps, {before:.4} -> {:.4} of loss per token", best.value)?;
        }
        if let Some(Loss { before, after, divergence }) = self.test {
            writeln!(f, "test: {before:.4} -> {after:.4} nats per token, KL {divergence:.4}")?;
        }
        Ok(())
    }
}

/// Checks everything, collects, plans, measures and writes. `None` if everything was only to be checked. The ranks of a
/// group collect the evidence together; the first does the rest, and the others have nothing to report.
///
/// # Errors
/// Whatever is wrong with the arguments or the files they name, and whatever stops the run.
pub fn run(arguments: &Arguments, group: &dyn Group, progress: Progress) -> Result<Option<Report>> {
    if group.size() > 1 && (arguments.share.shard.is_some() || arguments.train.is_some()) {
        let option = if arguments.train.is_some() { "--train" } else { "--shard" };
        return Err(Error::Usage(format!("{option}: found {} processes, expected one", group.size())));
    }
    let mut recipe = recipe(arguments)?;
    let existing = match (arguments.force, arguments.resume) {
        (true, _) => Existing::Force,
        (false, true) => Existing::Resume,
        (false, false) => Existing::Refuse,
    };
    let training = training(arguments)?;
    if training.is_none() {
        recipe.compression.as_ref().map_or(Ok(()), |how| how.check_scores(false))?;
    }
    let compact_dir = (training.is_some() || recipe.compression.is_some()).then(|| beside(&arguments.out, ".compact"));
    if arguments.dense.is_some() && compact_dir.is_none() {
        let reason = format!("--dense: recipe `{}` compresses no experts, and there is no --train", recipe.name);
        return Err(Error::Invalid(reason));
    }
    let work = arguments.work.clone().unwrap_or_else(|| beside(&arguments.out, ".work"));
    if arguments.resume && arguments.work.is_none() && group.rank() == 0 {
        cli::end_removal(&work)?;
    }
    group.check(None)?;
    // A run that was killed after the model had its name leaves its work: what comes after the model is made up for.
    let ended = arguments.resume && work.exists();
    for out in [Some(&arguments.out), arguments.dense.as_ref()].into_iter().flatten() {
        if !(ended && out.exists()) {
            OutputDir::check(out, existing)?;
        }
    }
    if let Some(dir) = &compact_dir {
        let replaced = if existing == Existing::Refuse { Existing::Refuse } else { Existing::Force };
        OutputDir::check(dir, replaced)?;
    }
    let protect = match &arguments.protect {
        Some(path) => {
            let json = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let mask: std::result::Result<ProtectionMask, _> = serde_json::from_str(&json);
            mask.map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?
        }
        None => ProtectionMask::none(),
    };
    let model = Model::open(&arguments.model, &moe_core::device::device(&arguments.device)?, arguments.max_memory)?
        .with_precision(arguments.precision);
    if let Some(amount) = kept(arguments, &model)? {
        recipe = recipe.with_amount(amount);
    }
    let calibration = rows(arguments, &model, None)?;
    let test = arguments.test.as_deref().map(|path| rows(arguments, &model, Some(path))).transpose()?;
    let form = form(arguments, &recipe, &model, progress);
    let merging = Merging {
        model: &model,
        waves: &calibration,
        recipe: &recipe,
        protect: &protect,
        form,
        mtp: arguments.mtp,
        sample: arguments.sample,
        at_once: arguments.at_once,
        absorb: &arguments.share.absorb,
        group,
    };
    merging.check()?;
    let existing_folder = work.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    check_space(existing_folder, merging.check_passes(&work)?)?;
    if arguments.check {
        return Ok(None);
    }

    // All have looked at what is there before anything is made or goes.
    group.check(None)?;
    let start = Instant::now();
    if arguments.force && arguments.work.is_none() && work.exists() && group.rank() == 0 {
        cli::remove_work(&work)?;
    }
    group.check(None)?;
    if let Some(shard) = arguments.share.shard {
        let Some(work) = &arguments.work else {
            return Err(Error::Usage("--shard: expected --work, where the share is left".into()));
        };
        merging.share(work, shard, progress)?;
        return Ok(None);
    }
    // Merged experts are those of one plan; evidence serves many.
    let evidence = merging.evidence_options().digest(&model, &calibration);
    let of = serde_json::json!([recipe, protect, evidence, arguments.at_once]).to_string();
    let merged_dir = work.join(format!("merged-{}", &blake3::hash(of.as_bytes()).to_hex()[..16]));
    let collected_together = merging.collect(&work, &merged_dir, progress)?;
    if group.rank() > 0 {
        return Ok(None);
    }
    let Merged { model: merged, weights, collect_seconds } = merging.merge(&work, &merged_dir, progress)?;
    let collect_seconds = collect_seconds + collected_together;
    let plan = weights.plan().clone();
    plan.save(beside(&arguments.out, ".plan.json"))?;
    let mut shown = merged.model().clone();
    let (compact, trained) = match (&training, &recipe.compression, &compact_dir) {
        (Some(how), _, Some(dir)) => {
            let merged = model.like(shown.clone())?;
            let trained = train_parts(how, &model, &merged, &calibration, dir, progress)?;
            (Some(trained.compact), Some(trained.train))
        }
        (None, Some(how), Some(dir)) => {
            (Some(how.compress(&shown, dir, None, arguments.force || arguments.resume)?), None)
        }
        _ => (None, None),
    };
    if let (Some(_), Some(dir)) = (&compact, &compact_dir) {
        shown = CompactModel::open(dir)?.on(&shown, Some(Dtype::F32))?.model().clone();
    }
    let merge_seconds = start.elapsed().as_secs_f64() - collect_seconds;
    if arguments.plan_only {
        let tokens = calibration.iter().map(Wave::tokens).sum();
        let merge = merged.report().clone();
        return Ok(Some(Report {
            compact,
            training: trained,
            merge,
            tokens,
            collect_seconds,
            merge_seconds,
            test: None,
        }));
    }
    let test = test.map(|test| loss(&model, &shown, &test)).transpose()?;
    let measured: Vec<(String, String)> = test.iter().flat_map(Loss::measured).collect();
    let write_options = WriteOptions { existing, measured: &measured, ..WriteOptions::default() };
    let written = |model: &Arc<Checkpoint>, to: &Path| -> Result<()> {
        if !(ended && cli::is_written(model, to)) {
            write(model, to, &write_options)?;
        }
        Ok(())
    };
    written(merged.model(), &arguments.out)?;
    if let (Some(dense), Some(dir)) = (&arguments.dense, &compact_dir) {
        written(CompactModel::open(dir)?.on(merged.model(), None)?.model(), dense)?;
    }
    // Before the work goes: the merged model reads from it.
    let page = crate::pages::of_merge(&model, &merged, &plan, test, &calibration[..calibration.len().min(1)])?;
    page.write(beside(&arguments.out, ".report.html"))?;
    if arguments.work.is_none() {
        cli::remove_work(&work)?;
    }
    Ok(Some(Report {
        compact,
        training: trained,
        merge: merged.report().clone(),
        tokens: calibration.iter().map(Wave::tokens).sum(),
        collect_seconds,
        merge_seconds,
        test,
    }))
}

/// The recipe that the arguments name, at the budget they give, if they do.
fn recipe(arguments: &Arguments) -> Result<Recipe> {
    let amount = match (arguments.ratio, arguments.experts_per_layer) {
        (Some(ratio), _) => Some(Amount::Ratio(ratio)),
        (None, Some(groups)) => Some(Amount::Groups(groups)),
        (None, None) => None,
    };
    let step = Merge { amount, ..Merge::new(arguments.recipe.clone()) };
    step.recipe()
}

/// How the parts of merged experts are trained, if they are.
fn training(arguments: &Arguments) -> Result<Option<CompactTraining>> {
    let Some(settings) = &arguments.train else { return Ok(None) };
    let Named::Parameters(settings) = settings else {
        return Err(Error::Usage("--train: takes JSON or a JSON file, and settings have no names".into()));
    };
    let mut training: CompactTraining = serde_json::from_value(serde_json::Value::Object(settings.clone()))
        .map_err(|error| Error::Usage(format!("--train: {error}")))?;
    let Arguments { steps, epochs, learning_rate, .. } = *arguments;
    TrainingChanges { steps, epochs, learning_rate, ..TrainingChanges::default() }.apply(&mut training.train)?;
    training.validate()?;
    Ok(Some(training))
}

/// How many experts are left of each layer by a budget of parameters or bytes, if that is how it was given.
fn kept(arguments: &Arguments, model: &Model) -> Result<Option<Amount>> {
    let (flag, budget) = match (arguments.keep_parameters, arguments.keep_bytes) {
        (Some(count), _) => ("--keep-parameters", Budget::KeepParameters(count)),
        (None, Some(bytes)) => ("--keep-bytes", Budget::KeepBytes(bytes)),
        (None, None) => return Ok(None),
    };
    let shape = model.checkpoint().shape();
    let Budget::KeepParameters(parameters) = budget.resolve(model.checkpoint())? else { return Ok(None) };
    let per_group: u64 = shape
        .layers
        .iter()
        .map(|layer| (layer.units() / layer.num_experts().max(1) * shape.parameters_per_unit()) as u64)
        .sum();
    match parameters / per_group.max(1) {
        0 => {
            Err(Error::Usage(format!("{flag}: less than one expert of every layer, which has {per_group} parameters")))
        }
        groups => Ok(Some(Amount::Groups(groups as usize))),
    }
}

/// The form that is asked for, or the best one that stock loaders read; said aloud if there is none.
fn form(arguments: &Arguments, recipe: &Recipe, model: &Model, progress: Progress) -> OutputForm {
    arguments.form.unwrap_or_else(|| match recipe.check(model.checkpoint(), OutputForm::Stock, arguments.mtp) {
        Ok(()) => OutputForm::Stock,
        Err(reason) => {
            progress.say(&format!("form grouped, which these crates read: {reason}"));
            OutputForm::Grouped
        }
    })
}

/// Waves of the rows of calibration, or of a file to measure on that is read like them.
fn rows(arguments: &Arguments, model: &Model, test: Option<&Path>) -> Result<Vec<Wave>> {
    let tokenizer = match arguments.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&arguments.model)?),
        false => None,
    };
    let mut data = arguments.data.clone();
    if let Some(path) = test {
        data.data = vec![Source { path: path.to_path_buf(), weight: None }];
    }
    Ok(data.load(tokenizer.as_ref(), model.config().vocab_size)?.waves(data.waves()))
}

/// What the merged model lost on some waves.
fn loss(model: &Model, merged: &Arc<Checkpoint>, waves: &[Wave]) -> Result<Loss> {
    let merged = model.like(merged.clone())?;
    let teacher = TeacherLogits::record(&Engine::new(model, EngineOptions::default()), waves, usize::MAX)?;
    let cross_entropy = |model: &Model| -> Result<f64> {
        let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
        let (mut sum, mut tokens) = (0.0, 0);
        for wave in waves {
            let report = engine.run(wave, &mut moe_core::trace::Nobody)?;
            sum += report.loss.unwrap_or(0.0);
            tokens += report.loss_tokens;
        }
        Ok(sum / tokens.max(1) as f64)
    };
    Ok(Loss {
        before: cross_entropy(model)?,
        after: cross_entropy(&merged)?,
        divergence: evaluate::divergence(&merged, &teacher, waves)?,
    })
}

/// The path with a suffix after its last component.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    path.with_file_name(name)
}
