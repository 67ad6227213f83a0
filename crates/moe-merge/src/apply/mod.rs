//! Carrying out a plan: checkpoint to checkpoint, streamed.

mod computed;
pub(crate) mod merged_dir;
mod settle;
mod store;
mod stream;
mod target;

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use moe_checkpoint::{BeforeAfter, Mtp, OnProgress};
use moe_checkpoint::{
    Checkpoint, Existing, OutputDir, ShardedWriter, WriterOptions, copy_side_files, dequantised_config, write_atomic,
    write_json,
};
use serde::{Deserialize, Serialize};

pub use computed::{ComputedExperts, MergedExperts};
pub use merged_dir::MergedWeights;

use crate::evidence::Evidence;
use crate::plan::MergePlan;
use crate::report::{LayerMergeReport, MergeReport};
use crate::router::RouterConfig;
use crate::{Error, Result};

/// Name of the file in an output directory that tells what was done; see [`MergeApplied`]. Stock loaders ignore it.
pub const MERGED_FILE: &str = "moe_merge.json";

/// Version of that file.
const APPLIED_VERSION: u64 = 1;

/// How a merged checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum OutputForm {
    /// One expert per group, router rows of the others deleted (or merged, if the recipe does so): loads in stock runtimes.
    /// Refused where layers have different numbers of groups.
    Stock,
    /// One set of weights per group, and an index map from router rows to sets (`docs/grouped-format.md`): the router of the
    /// recipe, any number of groups per layer. Stock runtimes refuse it.
    Grouped,
    /// Every expert of a group a copy of the merged one, the router as it was: loads in stock runtimes, saves nothing.
    StockCopies,
}

impl OutputForm {
    /// The name used in recipes and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Grouped => "grouped",
            Self::StockCopies => "stock-copies",
        }
    }
}

impl fmt::Display for OutputForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for OutputForm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Stock, Self::Grouped, Self::StockCopies];
        let found = all.into_iter().find(|form| form.name() == text);
        found.ok_or_else(|| Error::parameter("form", format!("`{text}`"), "`stock`, `grouped` or `stock-copies`"))
    }
}

/// How a plan is applied.
#[derive(Clone, Copy)]
pub struct MergeOptions<'a> {
    /// What is written.
    pub form: OutputForm,
    /// The evidence the plan was made from: needed again by recipes that fit on sampled tokens.
    pub evidence: Option<&'a Evidence>,
    /// Merged experts from elsewhere, such as a sequential run; otherwise they are computed.
    pub merged: Option<&'a dyn MergedExperts>,
    /// Most bytes of tensor data per file; a larger tensor gets its own file.
    pub max_shard_bytes: u64,
    /// Continue what an interrupted run left in `OUT.partial`.
    pub resume: bool,
    /// Replace an output that exists, once the new one is complete, and start over what an interrupted run left. Wins over
    /// `resume`.
    pub force: bool,
    /// What becomes of layers that predict further tokens. Needed where a checkpoint has them.
    pub mtp: Option<Mtp>,
    /// Told how far it is.
    pub progress: Option<OnProgress<'a>>,
}

impl MergeOptions<'_> {
    /// Options of this form: shards of 5 GB, nothing replaced or resumed.
    pub fn new(form: OutputForm) -> Self {
        Self {
            form,
            evidence: None,
            merged: None,
            max_shard_bytes: WriterOptions::default().max_shard_bytes,
            resume: false,
            force: false,
            mtp: None,
            progress: None,
        }
    }
}

impl fmt::Debug for MergeOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { form, evidence, merged, max_shard_bytes, resume, force, mtp, progress } = self;
        f.debug_struct("MergeOptions")
            .field("form", form)
            .field("evidence", &evidence.is_some())
            .field("merged", &merged.map(|merged| merged.digest()))
            .field("max_shard_bytes", max_shard_bytes)
            .field("resume", resume)
            .field("force", force)
            .field("mtp", mtp)
            .field("progress", &progress.is_some())
            .finish()
    }
}

/// What [`MERGED_FILE`] of an output directory holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeApplied {
    /// Version of the file.
    pub version: u64,
    /// Version of this crate.
    pub crate_version: String,
    /// What it did.
    pub report: MergeReport,
    /// What became of the router: that of the recipe, unless the form needs another.
    pub router: RouterConfig,
    /// Where merged experts came from: [`MergedExperts::digest`].
    pub experts: String,
    /// The plan, in the indices of the checkpoint it was applied to, with its recipe.
    pub plan: MergePlan,
}

impl MergeApplied {
    /// Reads what was done to make this checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`], [`Error::Version`], naming the file.
    pub fn load(directory: impl AsRef<Path>) -> Result<Self> {
        let path = directory.as_ref().join(MERGED_FILE);
        let json = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let applied: Self =
            serde_json::from_str(&json).map_err(|error| Error::invalid_plan(error.to_string()).in_file(&path))?;
        if applied.version != APPLIED_VERSION {
            let (found, supported) = (applied.version, APPLIED_VERSION);
            return Err(Error::Version { path: Some(path), what: "merge record", found, supported });
        }
        applied.plan.validate(&applied.plan.shape).map_err(|error| error.in_file(&path))?;
        Ok(applied)
    }
}

impl MergePlan {
    /// Writes the merged checkpoint to `to`, which appears whole or not at all: work happens in `TO.partial`.
    ///
    /// Tensors outside the routed experts and the router are copied; experts that do not change are copied byte for byte, so
    /// that a plan that merges nothing reproduces every tensor and the config. A layer's merged experts are computed once and
    /// wait in a temporary file beside the output: disk for one layer, memory for what the combination states.
    ///
    /// ```no_run
    /// use moe_checkpoint::Checkpoint;
    /// use moe_merge::{MergeOptions, MergePlan, OutputForm};
    ///
    /// let model = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
    /// let plan = MergePlan::load("plan.json")?;
    /// println!("{}", plan.apply(&model, "out/merged".as_ref(), &MergeOptions::new(OutputForm::Stock))?);
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// Before anything is written: [`Error::OtherModel`], [`Error::InvalidPlan`], [`Error::MissingEvidence`], [`Error::Output`] with the
    /// reason why this form is impossible, an output that exists. Later: those of the combination, [`Error::Checkpoint`] for the
    /// file system and [`Error::Interrupted`]; the input and an earlier output stay as they were.
    pub fn apply(&self, from: &Checkpoint, to: &Path, options: &MergeOptions<'_>) -> Result<MergeReport> {
        let fingerprint = from.fingerprint();
        if fingerprint != self.model {
            let (path, expected) = (from.dir().to_path_buf(), self.model.clone());
            return Err(Error::OtherModel { what: "plan", path, found: fingerprint, expected });
        }
        self.validate(from.shape())?;
        let refuse = |reason: String| Err(Error::Output { form: options.form.name(), reason });
        if matches!((from.dir().canonicalize(), to.canonicalize()), (Ok(a), Ok(b)) if a == b) {
            return refuse(format!("{} is the checkpoint itself; choose another directory", to.display()));
        }
        let target = target::Target::new(self, from, options.form)?;
        let (mut config, dropped) = settle::mtp(from, options, &target)?;
        if from.quantisation().is_some() {
            config = dequantised_config(&config);
        }
        let computed;
        let merged: &dyn MergedExperts = match options.merged {
            Some(merged) => merged,
            None => {
                computed = ComputedExperts::new(self, from, options.evidence)?;
                &computed
            }
        };
        let tensors = stream::tensors(from, &target, &dropped)?;
        let specs: Vec<_> = tensors.iter().map(|tensor| tensor.spec.clone()).collect();
        let recipe =
            format!("merge {} {:?} {fingerprint} {} {}", options.form, options.mtp, merged.digest(), self.to_json()?);
        let existing = match (options.force, options.resume) {
            (true, _) => Existing::Force,
            (false, true) => Existing::Resume,
            (false, false) => Existing::Refuse,
        };
        let output = OutputDir::create(to, existing)?;
        let writer_options = WriterOptions { max_shard_bytes: options.max_shard_bytes, recipe };
        let writer = ShardedWriter::new(output.path(), writer_options, specs)?;
        stream::write(from, &tensors, &target, merged, writer, (output.path(), options.progress))?;

        copy_side_files(from.dir(), output.path())?;
        let config_path = output.path().join("config.json");
        if config == *from.raw_config() {
            // Nothing changed: not even its spaces.
            let original = from.dir().join("config.json");
            let bytes = fs::read(&original).map_err(Error::io(&original))?;
            write_atomic(&config_path, &bytes)?;
        } else {
            write_json(&config_path, &config)?;
        }
        let report = self.report(from, &target, &tensors)?;
        let applied = MergeApplied {
            version: APPLIED_VERSION,
            crate_version: env!("CARGO_PKG_VERSION").to_string(),
            report,
            router: target.router,
            experts: merged.digest(),
            plan: self.clone(),
        };
        let json = serde_json::to_vec(&applied).map_err(|error| Error::invalid_plan(error.to_string()))?;
        write_atomic(output.path().join(MERGED_FILE), &json)?;
        // Config, headers and lengths are checked before the output gets its name.
        Checkpoint::open(output.path())?;
        output.commit()?;
        for note in &applied.report.notes {
            tracing::warn!("{note}");
        }
        Ok(applied.report)
    }

    fn report(&self, from: &Checkpoint, target: &target::Target, tensors: &[stream::OutTensor]) -> Result<MergeReport> {
        let mut layers = Vec::with_capacity(self.layers.len());
        for (position, (plan, written)) in self.layers.iter().zip(&target.layers).enumerate() {
            let experts = self.shape.layers[position].num_experts();
            let after = tensors.iter().filter(|tensor| tensor.layer() == Some(position));
            layers.push(LayerMergeReport {
                layer: plan.layer,
                experts: BeforeAfter { before: experts as u64, after: plan.groups.len() as u64 },
                router_rows: BeforeAfter {
                    before: experts as u64,
                    after: written.mix.as_ref().map_or(experts, |mix| mix.rows.len()) as u64,
                },
                alone: plan.groups.iter().filter(|group| group.members.len() == 1).count(),
                largest: plan.groups.iter().map(|group| group.members.len()).max().unwrap_or(0),
                dissolved: plan.dissolved.len(),
                protected: plan.protected.len(),
                bytes: BeforeAfter {
                    before: from.expert_bytes_on_disk(plan.layer)?,
                    after: after.map(|tensor| stream::bytes(&tensor.spec)).sum(),
                },
            });
        }
        Ok(MergeReport {
            form: target.form,
            recipe: self.recipe.name.clone(),
            ratio: self.ratio,
            bytes: BeforeAfter {
                before: from.bytes_on_disk(),
                after: tensors.iter().map(|tensor| stream::bytes(&tensor.spec)).sum(),
            },
            layers,
            never_used: self.never_used.clone(),
            notes: target.notes.clone(),
        })
    }
}
