//! What fine-tuning changed, as a small file.

use std::path::PathBuf;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Existing, WriteOptions, check_output, write};
use moe_peft::codec::{ComPeft, Delta, DeltaBase, DeltaReport, KeptValues, PlainDelta, TaskVector};

use crate::format::{count, size};
use crate::{Error, Result};

/// Writes what fine-tuning changed as a small file (ComPEFT), or adds such a file to its base.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "delta")]
pub struct Arguments {
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Verb {
    /// Write the difference of a fine-tuned checkpoint and its base, or an adapter, as a delta
    Encode {
        /// Checkpoint that was fine-tuned
        #[arg(long, value_name = "DIR", required_unless_present = "adapter", conflicts_with = "adapter")]
        base: Option<PathBuf>,
        /// What became of it
        #[arg(long, value_name = "DIR", requires = "base")]
        tuned: Option<PathBuf>,
        /// Directory of an adapter, instead of two checkpoints
        #[arg(long, value_name = "DIR")]
        adapter: Option<PathBuf>,
        /// Share of the elements that are kept, those of largest magnitude
        #[arg(long, default_value_t = 0.1, value_parser = crate::cli::ratio)]
        density: f64,
        /// Kept elements become their sign times so many standard deviations
        #[arg(long, default_value_t = 1.0)]
        alpha: f64,
        /// Keep tensors that changed as they are, instead
        #[arg(long, conflicts_with_all = ["density", "alpha"])]
        plain: bool,
        /// The file to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Add a delta to its base, or turn it back into an adapter
    Apply {
        /// The delta
        #[arg(value_name = "FILE")]
        delta: PathBuf,
        /// The checkpoint it was taken from; none for an adapter
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// The directory to write
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Replace what is there
        #[arg(long)]
        force: bool,
    },
}

/// Does it; what was written, for a terminal.
///
/// # Errors
/// Arguments that do not go together, and what stops it.
pub fn run(arguments: Arguments) -> Result<String> {
    match arguments.verb {
        Verb::Encode { base, tuned, adapter, density, alpha, plain, out } => {
            let open = |dir: &PathBuf| Checkpoint::open(dir);
            let checkpoints = match (&base, &tuned) {
                (Some(base), Some(tuned)) => Some((open(base)?, open(tuned)?)),
                (Some(_), None) => return Err(Error::Usage("--base needs --tuned DIR".into())),
                _ => None,
            };
            let vector = match (&checkpoints, &adapter) {
                (Some((base, tuned)), _) => TaskVector::Checkpoints { base, tuned },
                (None, Some(dir)) => TaskVector::Adapter { directory: dir, start: 0.0 },
                (None, None) => return Err(Error::Usage("--base and --tuned, or --adapter".into())),
            };
            let report = match plain {
                true => PlainDelta::Changed.encode(vector, &out)?,
                false => ComPeft { density, values: KeptValues::Scaled { alpha } }.encode(vector, &out)?,
            };
            Ok(text(&report, &out.display().to_string()))
        }
        Verb::Apply { delta, base, out, force } => {
            let existing = if force { Existing::Force } else { Existing::Refuse };
            let delta = Delta::open(delta)?;
            match (&delta.table().base, base) {
                (DeltaBase::Adapter { .. }, None) => drop(delta.restore_adapter(&out, existing)?),
                (DeltaBase::Adapter { .. }, Some(_)) => {
                    return Err(Error::Usage("this is the delta of an adapter: no --base".into()));
                }
                (_, Some(base)) => {
                    let base = Arc::new(Checkpoint::open(base)?);
                    let options = WriteOptions { existing, ..WriteOptions::default() };
                    check_output(&base, &out, &options)?;
                    write(delta.on(&base)?.model(), &out, &options)?;
                }
                (_, None) => return Err(Error::Usage("this is the delta of a checkpoint: --base DIR".into())),
            }
            Ok(format!("{}: written\n", out.display()))
        }
    }
}

fn text(report: &DeltaReport, out: &str) -> String {
    let DeltaReport { tensors, elements, kept, payload_bytes, file_bytes, dense_bytes, .. } = *report;
    format!(
        "{out}: {tensors} tensors, {} of {} elements kept, {} ({} without its table of tensors), {:.1} times smaller than the {} of 16 bits each\n",
        count(kept),
        count(elements),
        size(file_bytes),
        size(payload_bytes),
        report.ratio(),
        size(dense_bytes),
    )
}
