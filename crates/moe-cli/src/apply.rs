//! Applying saved plans.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use moe::jobs::SavedPlan;
use moe::recipe::Form;
use moe_checkpoint::{Checkpoint, Existing, Mtp, WriteOptions, write};
use moe_merge::{Evidence, MergeOptions, MergeReport, OutputForm};
use moe_prune::{EditSource, Edits, FineGrained, PruneForm, PruneOptions, PrunePlan, PrunedModel, PrunedPrecision};
use serde::Serialize;

use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// Applies saved plans of pruning and merging, one after the other, and writes the outcome
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe apply --model chat-model --plan base.steps/steps/prune-…/plan.json --rebind --out OUT\n  \
moe apply --model DIR --plan merge.json --evidence evidence.safetensors --plan prune.json --form ragged --out OUT"
)]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// A plan; repeatable: each goes on what the one before makes
    #[arg(long, value_name = "FILE", required = true)]
    pub plan: Vec<PathBuf>,
    /// Plans may be of another model of the same shape, such as the base of a chat model
    #[arg(long)]
    pub rebind: bool,
    /// Weights that a repair changed, for the last plan of pruning
    #[arg(long, value_name = "FILE")]
    pub edits: Option<PathBuf>,
    /// Evidence that a plan of merging was made from, where it fits on sampled tokens
    #[arg(long, value_name = "FILE")]
    pub evidence: Option<PathBuf>,
    /// What a pruned model looks like: uniform, fine_grained, ragged or masked [default: uniform where it can be]
    #[arg(long, default_value = "auto", value_parser = crate::prune::form)]
    pub form: Form,
    /// Pieces of an expert, in the form fine_grained
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub pieces: usize,
    /// What a merged model looks like: stock, grouped or stock-copies
    #[arg(long, default_value = "stock")]
    pub merged_form: OutputForm,
    /// Layers that predict further tokens: keep, drop or prune
    #[arg(long, value_parser = crate::prune::mtp)]
    pub mtp: Option<Mtp>,
    /// Write what is pruned from a quantized model as BF16, not as it is quantized
    #[arg(long)]
    pub bf16: bool,
    /// New directory for the model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Go on with what an interrupted run left
    #[arg(long)]
    pub resume: bool,
    /// Replace an output that is there
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What was applied.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What each plan did, in order.
    pub applied: Vec<Applied>,
    /// Parameters of the outcome.
    pub parameters: u64,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// The directory.
    pub out: PathBuf,
}

/// What one plan did.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Applied {
    /// A plan of pruning.
    Prune(moe_prune::Report),
    /// A plan of merging.
    Merge(MergeReport),
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for applied in &self.applied {
            match applied {
                Applied::Prune(report) => writeln!(f, "{report}")?,
                Applied::Merge(report) => writeln!(f, "{report}")?,
            }
        }
        writeln!(f, "{}", self.out.display())
    }
}

/// Applies the plans and writes.
///
/// # Errors
/// Plans that do not fit, forms that are impossible, an output that exists: before anything is written.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<Report> {
    let mut model = Arc::new(Checkpoint::open(&arguments.model)?);
    let mut applied = Vec::new();
    let plans = arguments.plan.iter().map(|path| SavedPlan::load(path)).collect::<Result<Vec<_>>>()?;
    let last_prune = plans.iter().rposition(|plan| matches!(plan, SavedPlan::Prune(_)));
    if arguments.edits.is_some() && last_prune.is_none() {
        return Err(Error::Usage("--edits: goes with a plan of pruning, and there is none".into()));
    }
    for (number, plan) in plans.into_iter().enumerate() {
        let plan = match (arguments.rebind, model.is_model(plan.model())) {
            (true, _) => plan.rebound(&model)?,
            (false, true) => plan,
            (false, false) => {
                let (path, made_for) = (arguments.plan[number].display(), plan.model());
                let found = format!("{} is {}", model.dir().display(), model.fingerprint());
                return Err(Error::Invalid(format!(
                    "{path}: made for the model {made_for}, and {found}; --rebind gives it to a sibling of the same shape"
                )));
            }
        };
        match plan {
            SavedPlan::Prune(plan) => {
                let edits = arguments.edits.as_ref().filter(|_| Some(number) == last_prune);
                let pruned = prune(arguments, &plan, edits, &model)?;
                applied.push(Applied::Prune(pruned.report().clone()));
                model = pruned.model().clone();
            }
            SavedPlan::Merge(plan) => {
                let evidence = arguments.evidence.as_ref().map(Evidence::load).transpose()?.map(Arc::new);
                let options = MergeOptions { evidence, mtp: arguments.mtp, ..MergeOptions::new(arguments.merged_form) };
                let merged = plan.on(&model, &options)?;
                applied.push(Applied::Merge(merged.report().clone()));
                model = merged.model().clone();
            }
        }
    }
    let bar = progress.bar("writing", model.bytes_on_disk(), Unit::Bytes);
    let tell = |at: &moe_checkpoint::Progress<'_>| {
        bar.at(at.done);
        Ok(())
    };
    let existing = match (arguments.force, arguments.resume) {
        (true, _) => Existing::Force,
        (_, true) => Existing::Resume,
        _ => Existing::Refuse,
    };
    write(&model, &arguments.out, &WriteOptions { existing, progress: Some(&tell), ..WriteOptions::default() })?;
    let (parameters, bytes) = (model.parameters(), model.bytes_on_disk());
    Ok(Report { applied, parameters, bytes, out: arguments.out.clone() })
}

fn prune(
    arguments: &Arguments,
    plan: &PrunePlan,
    edits: Option<&PathBuf>,
    model: &Arc<Checkpoint>,
) -> Result<PrunedModel> {
    let edits = match edits {
        Some(path) => Some(Arc::new(Edits::load(path, plan)?) as Arc<dyn EditSource>),
        None => None,
    };
    let form = arguments.form.with(FineGrained::new(arguments.pieces));
    let precision = if arguments.bf16 { PrunedPrecision::Bf16 } else { PrunedPrecision::AsBase };
    let options = PruneOptions { mtp: arguments.mtp, edits, precision, ..PruneOptions::new(form) };
    Ok(plan.on(model, &options)?)
}

/// The model that a saved plan makes of another one, to be run rather than written: in the form that keeps widths as
/// they are planned.
///
/// # Errors
/// A plan that cannot be read or is for another model; one of merging that was fitted on sampled tokens, which only
/// `moe apply --evidence` has.
pub fn planned(model: &Arc<Checkpoint>, path: &std::path::Path) -> Result<Arc<Checkpoint>> {
    // What becomes of layers that predict further tokens makes no difference to a model that is only run.
    let mtp = model.mtp_tensors().next().is_some().then_some(Mtp::Drop);
    Ok(match SavedPlan::load(path)? {
        SavedPlan::Prune(plan) => {
            let options = PruneOptions { mtp, ..PruneOptions::new(PruneForm::Ragged) };
            plan.on(model, &options)?.model().clone()
        }
        SavedPlan::Merge(plan) => {
            let options = MergeOptions { mtp, ..MergeOptions::new(OutputForm::Grouped) };
            plan.on(model, &options)?.model().clone()
        }
    })
}
