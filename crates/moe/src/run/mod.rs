//! Carrying out a recipe: checked wholly first, then step by step, every step's artifact kept and reused while nothing
//! it follows from has changed.

mod adapt;
mod artifacts;
mod calibration;
mod chain;
mod check;
mod curves;
mod decompose;
mod disk;
mod estimate;
mod evolve;
mod frontier;
mod merge;
mod prune;
mod quantize;
mod score;
mod sparsify;
mod steps;
mod together;
mod tune;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::Device;
use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Checkpoint, ProtectionMask, ScoreTable};
use moe_core::Model;
use moe_core::adaptive::RunTime;
use moe_core::data::Tokenizer;
use moe_prune::{Edits, PrunePlan};
use serde::{Deserialize, Serialize};

pub use calibration::Calibration;
pub(crate) use frontier::POINTS;

use crate::jobs::StockForm;
use crate::progress::Progress;
use crate::recipe::{Prune, Recipe, Step};
use crate::table::Table;
use crate::{Error, Result, format};
use artifacts::Artifacts;

/// How a recipe is run.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions<'a> {
    /// Go on in the output directory of an earlier run, of this or another version of the recipe; what has not changed
    /// is reused.
    pub resume: bool,
    /// Replace models that earlier runs wrote.
    pub force: bool,
    /// Check everything and do nothing.
    pub check: bool,
    /// Where progress is shown.
    pub progress: Progress,
    /// Does the share `index` of `count`, counted from 0, of the first step that is not done and can be shared out
    /// (what scores are made of and the evidence of merges by waves, refits by layers), and ends there. The steps
    /// before it are done by every share, measurements and models are left to the run that takes over all of them.
    pub shard: Option<(usize, usize)>,
    /// Output directories of runs that did other shares, whose parts are taken over.
    pub absorb: &'a [PathBuf],
    /// Who runs the recipe together: all ranks call [`run`] with the same, in an output directory that all see. They
    /// share what runs the model over waves (scores, evidence, merges layer by layer, repairs, training by the methods
    /// that can be shared, likelihoods); the rest is done by the first, while the others wait.
    pub group: &'a dyn Group,
}

impl RunOptions<'_> {
    /// A new run by this process alone.
    pub fn new(progress: Progress) -> Self {
        Self { resume: false, force: false, check: false, progress, shard: None, absorb: &[], group: &Alone }
    }
}

/// A figure of merit of a model, at a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What was measured: `NAME_exact`, `NAME_ppl` or `NAME_choice`.
    pub key: String,
    /// The figure.
    pub value: f64,
}

/// What one step did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Name of the step.
    pub step: String,
    /// What it did, in a line.
    pub summary: String,
    /// Whether an artifact of an earlier run was taken.
    pub reused: bool,
    /// Seconds it took.
    pub seconds: f64,
    /// Its artifact, if it keeps one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<PathBuf>,
    /// What was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured: Vec<Measurement>,
    /// Parameters of the model after it.
    pub parameters: u64,
    /// Bytes of the model after it.
    pub bytes: u64,
    /// Memory that it is expected to take, in bytes, where the recipe is only checked. Then seconds, parameters and
    /// bytes are estimates, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
}

/// What a recipe did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The steps, in order.
    pub steps: Vec<StepReport>,
    /// Directories of models that were written.
    pub written: Vec<PathBuf>,
    /// Largest resident size of the process, in MiB.
    pub peak_rss_mib: Option<f64>,
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.steps.iter().any(|step| step.memory.is_some()) {
            let mut table = Table::new(["step", "about, seconds", "memory", "parameters after", "bytes after"], 1);
            for step in &self.steps {
                let memory = step.memory.filter(|bytes| *bytes > 0).map_or("–".into(), format::size);
                let (parameters, bytes) = (format::count(step.parameters), format::size(step.bytes));
                table.row([step.step.clone(), format!("{:.1}", step.seconds), memory, parameters, bytes]);
            }
            let seconds: f64 = self.steps.iter().map(|step| step.seconds).sum();
            writeln!(f, "{}", table.to_text())?;
            return writeln!(
                f,
                "nothing was done; {seconds:.0} seconds in all, as this machine multiplies matrices now"
            );
        }
        let mut names: Vec<&str> = Vec::new();
        for measured in self.steps.iter().flat_map(|step| &step.measured) {
            if !names.contains(&measured.key.as_str()) {
                names.push(&measured.key);
            }
        }
        let header = ["step", "what it did"].into_iter().chain(names.iter().copied());
        let mut table = Table::new(header.chain(["parameters", "bytes", "seconds"]), 2);
        for step in &self.steps {
            let reused = if step.reused { " (reused)" } else { "" };
            let value = |name: &&str| {
                let found = step.measured.iter().find(|measured| measured.key == *name);
                found.map_or(String::new(), |measured| format!("{:.4}", measured.value))
            };
            let mut row = vec![step.step.clone(), format!("{}{reused}", step.summary)];
            row.extend(names.iter().map(value));
            row.extend([format::count(step.parameters), format::size(step.bytes), format!("{:.1}", step.seconds)]);
            table.row(row);
        }
        writeln!(f, "{}", table.to_text())?;
        self.written.iter().try_for_each(|path| writeln!(f, "{}", path.display()))
    }
}

/// What a plan made of a model, as long as it can be repaired.
#[derive(Clone)]
struct PrunedState {
    base: Arc<Checkpoint>,
    plan: PrunePlan,
    step: Prune,
    chosen: StockForm,
    scores: Option<ScoreTable>,
    edits: Option<Arc<Edits>>,
    /// Whether the pruned model itself was changed since.
    repaired: bool,
}

/// Where a run is.
pub(crate) struct Run<'a> {
    recipe: &'a Recipe,
    options: RunOptions<'a>,
    device: Device,
    max_memory: Option<u64>,
    artifacts: Artifacts,
    tokenizer: Option<Tokenizer>,
    calibration: Option<Calibration>,
    /// The model as it is now.
    model: Arc<Checkpoint>,
    /// Score files by name of the scorer, the last ones last.
    scores: Vec<(String, ScoreTable)>,
    super_experts: Option<ProtectionMask>,
    protect: ProtectionMask,
    pruned: Option<PrunedState>,
    /// What fine-tuning left beside the weights: an adapter, or a checkpoint with files of its own.
    beside: Option<PathBuf>,
    /// How the model is run.
    run_time: RunTime,
    /// The last measurements, for the card of a model that is written.
    measured: Vec<Measurement>,
    written: Vec<PathBuf>,
}

impl Run<'_> {
    /// The model as it is now, to be run.
    fn engine_model(&self) -> Result<Model> {
        let model = self.model_of(self.model.clone())?;
        let model = match &self.beside {
            Some(dir) => moe_peft::open(dir)?.onto(&model)?.0,
            None => model,
        };
        Ok(self.run_time.on(&model)?.unwrap_or(model))
    }

    /// A checkpoint, to be run as the recipe says.
    fn model_of(&self, checkpoint: Arc<Checkpoint>) -> Result<Model> {
        Ok(Model::new(checkpoint, &self.device, self.max_memory)?.with_precision(self.recipe.precision))
    }

    /// What the model as it is now follows from.
    fn identity(&self) -> String {
        let artifact = self.beside.as_deref().and_then(std::path::Path::parent).and_then(std::path::Path::file_name);
        let weights = match artifact {
            Some(name) => format!("{} with {}", self.model.fingerprint(), name.to_string_lossy()),
            None => self.model.fingerprint(),
        };
        match self.run_time.is_plain() {
            true => weights,
            false => format!("{weights} run as {}", serde_json::json!(self.run_time)),
        }
    }

    fn calibration(&self) -> Result<&Calibration> {
        self.calibration.as_ref().ok_or_else(|| {
            Error::Usage("data.calibration: names no file, which a step that runs the model on data needs".into())
        })
    }
}

/// Carries out a recipe. Everything that the config, the files and the recipe show to be wrong is an error before the
/// first step.
///
/// # Errors
/// What is wrong, then whatever stops a step, on any rank; artifacts of finished steps stay, and a later run with
/// [`RunOptions::resume`] goes on from them.
pub fn run(recipe: &Recipe, options: RunOptions<'_>) -> Result<RunReport> {
    options.group.agree(on_this_rank(recipe, options))
}

fn on_this_rank(recipe: &Recipe, options: RunOptions<'_>) -> Result<RunReport> {
    let mut run = check::checked(recipe, options)?;
    let mut steps = Vec::with_capacity(recipe.steps.len());
    if options.check {
        for (step, estimate) in recipe.steps.iter().zip(estimate::of(recipe, &run)?) {
            steps.push(StepReport {
                step: step.name().into(),
                summary: "checked".into(),
                reused: false,
                seconds: estimate.seconds,
                artifact: None,
                measured: vec![],
                parameters: estimate.parameters,
                bytes: estimate.bytes,
                memory: Some(estimate.memory),
            });
        }
        return Ok(RunReport { steps, written: vec![], peak_rss_mib: None });
    }
    run.begin()?;
    let mut shared = false;
    for step in &recipe.steps {
        if options.shard.is_some() && matches!(step, Step::Write(_)) {
            continue;
        }
        let start = std::time::Instant::now();
        let done = run.take_together(step)?;
        let report = StepReport {
            step: step.name().into(),
            summary: done.summary,
            reused: done.reused,
            seconds: start.elapsed().as_secs_f64(),
            artifact: done.artifact,
            measured: done.measured,
            parameters: run.model.parameters(),
            bytes: run.model.bytes_on_disk(),
            memory: None,
        };
        options.progress.say(&format!("{}: {}", report.step, report.summary));
        steps.push(report);
        if done.share {
            shared = true;
            break;
        }
    }
    if let (Some((index, count)), false) = (options.shard, shared) {
        return Err(Error::Usage(format!(
            "share {index} of {count}: no step is left whose work can be shared out; scores, evidence of merges, refit and \
             mean_output can"
        )));
    }
    let peak_rss_mib = moe_core::memory::process_memory().map(|memory| memory.peak as f64 / (1 << 20) as f64);
    let report = RunReport { steps, written: run.written, peak_rss_mib };
    if !shared && options.group.rank() == 0 {
        crate::report::write_run(recipe, &report)?;
    }
    Ok(report)
}
