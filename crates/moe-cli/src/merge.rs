//! Evidence from calibration data, a merge plan, a merged checkpoint, and what it lost.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use moe_checkpoint::Checkpoint;
use moe_core::data::{Dataset, DatasetOptions, Tokenizer, Wave, WaveOptions};
use moe_core::{Engine, EngineOptions, Model, TeacherLogits, evaluate};
use moe_merge::{
    Amount, CompactModel, CompactOverlay, CompactReport, Evidence, EvidenceOptions, MergeOptions, MergePlan,
    MergeReport, OutputForm, Recipe, collect_evidence, merge_sequentially,
};
use moe_prune::{Mtp, ProtectionMask};
use serde::Serialize;

use crate::progress::{Progress, Unit};
use crate::{Error, Result, cli, format};

/// Merges routed experts of a checkpoint.
#[derive(Clone, Debug, Parser)]
#[command(after_help = format!("Recipes: {}", Recipe::names().collect::<Vec<_>>().join(", ")))]
pub struct Arguments {
    /// Directory of a Hugging Face checkpoint
    #[arg(long)]
    pub model: PathBuf,
    /// Rows to calibrate on: .jsonl or .txt
    #[arg(long)]
    pub calibration: PathBuf,
    /// A published method by name, or a recipe as a JSON file
    #[arg(long)]
    pub recipe: String,
    /// Fraction of the experts to merge away
    #[arg(long, value_parser = cli::ratio, default_value = "0.5")]
    pub ratio: f64,
    /// stock, grouped or stock-copies
    #[arg(long, default_value = "grouped")]
    pub form: OutputForm,
    /// New directory for the merged checkpoint; its plan goes beside it, as OUT.plan.json
    #[arg(long)]
    pub out: PathBuf,
    /// Merge all layers on one pass, even if the recipe goes layer by layer
    #[arg(long)]
    pub at_once: bool,
    /// Experts that nothing may change, as a protection mask (protect.json of the example score)
    #[arg(long)]
    pub protect: Option<PathBuf>,
    /// Rows to measure the divergence from the original model on
    #[arg(long)]
    pub test: Option<PathBuf>,
    /// Leave out layers that predict further tokens
    #[arg(long)]
    pub drop_mtp: bool,
    /// Tokens of each layer that alignments and least squares see
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(1))]
    pub sample: usize,
    /// Sequences to use, at most
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(1))]
    pub samples: usize,
    /// Tokens per sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Shuffle rows with this seed; without it, the first rows
    #[arg(long)]
    pub seed: Option<u64>,
    /// Tokens that go through the model together
    #[arg(long, default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// Replace an output that exists
    #[arg(long)]
    pub force: bool,
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
    /// What compressing the merged experts did, if the recipe does so: they are in OUT.compact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compact: Option<CompactReport>,
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.merge)?;
        let Self { tokens, collect_seconds, merge_seconds, .. } = self;
        writeln!(f, "{tokens} tokens; {collect_seconds:.1} s of collecting, {merge_seconds:.1} s of merging")?;
        if let Some(compact) = &self.compact {
            let (before, after) = (format::size(compact.bytes_before), format::size(compact.bytes_after));
            writeln!(f, "experts compressed: {before} -> {after}")?;
        }
        if let Some(Loss { before, after, divergence }) = self.test {
            writeln!(f, "test: {before:.4} -> {after:.4} nats per token, KL {divergence:.4}")?;
        }
        let bytes = &self.merge.bytes;
        writeln!(f, "{} -> {}", format::size(bytes.before), format::size(bytes.after))
    }
}

/// Checks everything, collects, plans and writes.
///
/// # Errors
/// Whatever is wrong with the arguments or the files they name, and whatever stops the run.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<Report> {
    let recipe = match Recipe::names().any(|name| name == arguments.recipe) {
        true => Recipe::named(&arguments.recipe)?,
        false => Recipe::from_json(&std::fs::read_to_string(&arguments.recipe).map_err(Error::io(&arguments.recipe))?)?,
    };
    let recipe = recipe.with_amount(Amount::Ratio(arguments.ratio));
    if arguments.out.exists() && !arguments.force {
        return Err(Error::Invalid(format!("{}: exists; --force replaces it", arguments.out.display())));
    }
    let protect = match &arguments.protect {
        Some(path) => {
            let json = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let mask: std::result::Result<ProtectionMask, _> = serde_json::from_str(&json);
            mask.map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?
        }
        None => ProtectionMask::none(),
    };
    let model = Model::open(&arguments.model, &moe_core::device::device(&arguments.device)?, arguments.max_memory)?;
    let calibration = rows(arguments, &model, &arguments.calibration)?;
    let test = arguments.test.as_deref().map(|path| rows(arguments, &model, path)).transpose()?;
    let options = EvidenceOptions::for_recipe(&recipe, arguments.sample);
    let mtp = arguments.drop_mtp.then_some(Mtp::Drop);
    let apply = MergeOptions { mtp, force: arguments.force, ..MergeOptions::new(arguments.form) };
    let start = Instant::now();
    let (merge, collect_seconds) = if recipe.sequential && !arguments.at_once {
        let work = beside(&arguments.out, ".layers");
        let merged = merge_sequentially(&model, &calibration, &recipe, &protect, &options, &work)?;
        let plan = merged.plan();
        plan.save(beside(&arguments.out, ".plan.json"))?;
        let report =
            plan.apply(model.checkpoint(), &arguments.out, &MergeOptions { merged: Some(&merged), ..apply })?;
        std::fs::remove_dir_all(&work).map_err(Error::io(&work))?;
        (report, 0.0)
    } else {
        let bar = progress.bar("collecting", calibration.len() as u64, Unit::Count("waves"));
        let evidence = collect_evidence(&model, &calibration, &options, &mut |done, _| bar.at(done as u64))?;
        drop(bar);
        let collected = start.elapsed().as_secs_f64();
        (write(arguments, &model, &recipe, &evidence, &protect, &apply)?, collected)
    };
    let compact_dir = beside(&arguments.out, ".compact");
    let compact = match &recipe.compression {
        Some(how) => Some(how.compress(&Checkpoint::open(&arguments.out)?, &compact_dir, None, arguments.force)?),
        None => None,
    };
    let merge_seconds = start.elapsed().as_secs_f64() - collect_seconds;
    let compact_dir = compact.is_some().then_some(compact_dir);
    Ok(Report {
        compact,
        merge,
        tokens: calibration.iter().map(Wave::tokens).sum(),
        collect_seconds,
        merge_seconds,
        test: test.map(|test| loss(arguments, &model, compact_dir.as_deref(), &test)).transpose()?,
    })
}

fn write(
    arguments: &Arguments,
    model: &Model,
    recipe: &Recipe,
    evidence: &Evidence,
    protect: &ProtectionMask,
    apply: &MergeOptions<'_>,
) -> Result<MergeReport> {
    let plan: MergePlan = recipe.plan(model.checkpoint(), evidence, protect)?;
    plan.save(beside(&arguments.out, ".plan.json"))?;
    let options = MergeOptions { evidence: Some(evidence), ..*apply };
    Ok(plan.apply(model.checkpoint(), &arguments.out, &options)?)
}

/// Waves of a file of rows.
fn rows(arguments: &Arguments, model: &Model, path: &Path) -> Result<Vec<Wave>> {
    let tokenizer = match arguments.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&arguments.model)?),
        false => None,
    };
    let options = DatasetOptions {
        samples: Some(arguments.samples),
        length: arguments.length,
        seed: arguments.seed,
        ..DatasetOptions::default()
    };
    let data = Dataset::load(path, tokenizer.as_ref(), model.config().vocab_size, &options)?;
    Ok(data.waves(WaveOptions::Tokens(arguments.wave_tokens)))
}

/// What the merged checkpoint lost on some waves.
fn loss(arguments: &Arguments, model: &Model, compact: Option<&Path>, waves: &[Wave]) -> Result<Loss> {
    let mut merged = Model::open(&arguments.out, model.device(), arguments.max_memory)?;
    if let Some(compact) = compact {
        merged = CompactOverlay::of(CompactModel::open(compact)?, &merged)?;
    }
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
