//! Applying saved plans.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use moe::recipe::Form;
use moe_checkpoint::{Checkpoint, Existing, Mtp, WriteOptions, write};
use moe_merge::{Evidence, MergeOptions, MergePlan, OutputForm};
use moe_prune::{EditSource, Edits, FineGrained, PruneForm, PruneOptions, PrunePlan, PrunedPrecision};
use serde_json::Value;

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
}

/// Applies the plans and writes; text to print.
///
/// # Errors
/// Plans that do not fit, forms that are impossible, an output that exists: before anything is written.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<String> {
    let mut model = Arc::new(Checkpoint::open(&arguments.model)?);
    let mut told = String::new();
    let last_prune = arguments.plan.iter().rposition(|path| is_prune(path).unwrap_or(false));
    for (number, path) in arguments.plan.iter().enumerate() {
        if is_prune(path)? {
            let edits = arguments.edits.as_ref().filter(|_| Some(number) == last_prune);
            let (pruned, report) = prune(arguments, path, edits, &model)?;
            (model, told) = (pruned, told + &report);
        } else {
            let mut plan = MergePlan::load(path)?;
            if arguments.rebind && !model.is_model(&plan.model) {
                plan.validate(model.shape())?;
                plan.model = model.fingerprint();
            }
            let evidence = arguments.evidence.as_ref().map(Evidence::load).transpose()?.map(Arc::new);
            let options = MergeOptions { evidence, mtp: arguments.mtp, ..MergeOptions::new(arguments.merged_form) };
            let merged = plan.on(&model, &options)?;
            told += &format!("{}\n", merged.report());
            model = merged.model().clone();
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
    Ok(format!("{told}{}\n", arguments.out.display()))
}

/// Whether a file is a plan of pruning rather than of merging.
fn is_prune(path: &PathBuf) -> Result<bool> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?;
    Ok(value.get("kept").is_some())
}

fn prune(
    arguments: &Arguments,
    path: &PathBuf,
    edits: Option<&PathBuf>,
    model: &Arc<Checkpoint>,
) -> Result<(Arc<Checkpoint>, String)> {
    let mut plan = PrunePlan::load(path)?;
    if arguments.rebind && !model.is_model(&plan.model) {
        plan.validate(model.shape())?;
        plan.model = model.fingerprint();
    }
    let edits = match edits {
        Some(path) => Some(Arc::new(Edits::load(path, &plan)?) as Arc<dyn EditSource>),
        None => None,
    };
    let form = match arguments.form {
        Form::Auto | Form::Uniform => PruneForm::Uniform,
        Form::Ragged => PruneForm::Ragged,
        Form::Masked => PruneForm::Masked,
        Form::FineGrained => PruneForm::FineGrained(FineGrained::new(arguments.pieces)),
    };
    let precision = if arguments.bf16 { PrunedPrecision::Bf16 } else { PrunedPrecision::AsBase };
    let options = PruneOptions { mtp: arguments.mtp, edits, precision, ..PruneOptions::new(form) };
    let pruned = plan.on(model, &options)?;
    Ok((pruned.model().clone(), format!("{}\n", pruned.report())))
}

/// The model that a saved plan makes of another one, to be run rather than written: in the form that keeps widths as
/// they are planned.
///
/// # Errors
/// A plan that cannot be read or is for another model; one of merging that was fitted on sampled tokens, which only
/// `moe apply --evidence` has.
pub fn planned(model: &Arc<Checkpoint>, path: &PathBuf) -> Result<Arc<Checkpoint>> {
    // What becomes of layers that predict further tokens makes no difference to a model that is only run.
    let mtp = model.mtp_tensors().next().is_some().then_some(Mtp::Drop);
    if is_prune(path)? {
        let options = PruneOptions { mtp, ..PruneOptions::new(PruneForm::Ragged) };
        return Ok(PrunePlan::load(path)?.on(model, &options)?.model().clone());
    }
    let options = MergeOptions { mtp, ..MergeOptions::new(OutputForm::Grouped) };
    Ok(MergePlan::load(path)?.on(model, &options)?.model().clone())
}
