//! Between the layouts of ragged experts.

use std::fmt;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use moe_checkpoint::{Checkpoint, Existing, WriteOptions, is_flat_ragged, open_flat_ragged, write, write_flat_ragged};
use serde::Serialize;

use crate::{Error, Result, format};

/// Writes a ragged model in another layout: this project's, or the one that the vLLM plugin of Less-is-MoE reads
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Examples:\n  moe convert out/ragged --to flat-ragged --out out/for-vllm\n  \
moe convert out/for-vllm --to ragged --out out/ragged\n\n\
flat-ragged: HectorHHZ/Less-is-MoE, docs/RAGGED_EXPERTS.md, format version 1 for Qwen1.5-MoE, OLMoE, Qwen3-MoE and \
Qwen3.5-MoE, version 2 for gpt-oss and Gemma 4.")]
pub struct Arguments {
    /// Directory of a ragged model, in either layout
    #[arg(value_name = "DIR")]
    pub model: PathBuf,
    /// The layout to write
    #[arg(long, value_name = "LAYOUT")]
    pub to: Layout,
    /// New directory
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Go on with what an interrupted run left
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace an output that is there
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The layout.
    pub layout: Layout,
    /// Bytes of tensors.
    pub bytes: u64,
    /// The directory.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.out.display(), format::size(self.bytes))
    }
}

/// A layout of ragged experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// This project's: opens with these crates.
    Ragged,
    /// That of the vLLM plugin.
    FlatRagged,
}

/// Reads the one and writes the other.
///
/// # Errors
/// A directory that is in neither layout, a model that the other cannot hold, an output that exists.
pub fn run(arguments: &Arguments) -> Result<Report> {
    let existing = match (arguments.force, arguments.resume) {
        (true, _) => Existing::Force,
        (_, true) => Existing::Resume,
        _ => Existing::Refuse,
    };
    let model = match is_flat_ragged(&arguments.model) {
        true => open_flat_ragged(&arguments.model)?,
        false => Checkpoint::open(&arguments.model)?,
    };
    if !model.ragged() {
        let directory = arguments.model.display();
        return Err(Error::Invalid(format!(
            "{directory}: experts of one width; moe prune --form ragged makes ragged ones"
        )));
    }
    let bytes = match arguments.to {
        Layout::Ragged => {
            write(&model, &arguments.out, &WriteOptions { existing, ..WriteOptions::default() })?;
            model.bytes_on_disk()
        }
        Layout::FlatRagged => write_flat_ragged(&model, &arguments.out, existing)?.bytes,
    };
    Ok(Report { layout: arguments.to, bytes, out: arguments.out.clone() })
}
