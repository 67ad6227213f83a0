//! What fine-tuning changed, as a small file.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Existing, WriteOptions, check_output, write};
use moe_peft::codec::{ComPeft, Delta, DeltaBase, DeltaReport, KeptValues, PlainDelta, TaskVector};
use serde::Serialize;

use crate::format::{count, size};
use crate::{Error, Result};

/// Writes what fine-tuning changed as a small file (ComPEFT), or adds such a file to its base.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "delta",
    after_help = "Examples:\n  moe delta encode --base DIR --tuned DIR --density 0.1 --out domain.delta\n  \
moe delta apply domain.delta --base DIR --out OUT"
)]
pub struct Arguments {
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
    /// One JSON object on stdout
    #[arg(long, global = true)]
    pub json: bool,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The file or directory.
    pub out: PathBuf,
    /// Sizes, of a delta.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub delta: Option<DeltaReport>,
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

/// Does it.
///
/// # Errors
/// Arguments that do not go together, and what stops it.
pub fn run(arguments: Arguments) -> Result<Report> {
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
            Ok(Report { out, delta: Some(report) })
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
            Ok(Report { out, delta: None })
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let out = self.out.display();
        let Some(report) = &self.delta else { return writeln!(f, "{out}: written") };
        let DeltaReport { tensors, elements, kept, payload_bytes, file_bytes, dense_bytes, .. } = *report;
        let (kept, elements, ratio) = (count(kept), count(elements), report.ratio());
        let [file, payload, dense] = [file_bytes, payload_bytes, dense_bytes].map(size);
        writeln!(
            f,
            "{out}: {tensors} tensors, {kept} of {elements} elements kept, {file} ({payload} without its table of tensors), \
             {ratio:.1} times smaller than the {dense} of 16 bits each"
        )
    }
}
