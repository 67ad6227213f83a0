//! Between the layouts of ragged experts.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use moe_checkpoint::{Checkpoint, Existing, WriteOptions, is_flat_ragged, open_flat_ragged, write, write_flat_ragged};

use crate::{Error, Result, format};

/// Writes a ragged model in another layout: this project's, or the one that the vLLM plugin of Less-is-MoE reads
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Examples:\n  moe convert out/ragged --to flat-ragged --out out/for-vllm\n  \
moe convert out/for-vllm --to ragged --out out/ragged\n\n\
flat-ragged: HectorHHZ/Less-is-MoE, docs/RAGGED_EXPERTS.md, format version 1, for Qwen1.5-MoE, OLMoE, Qwen3-MoE and Qwen3.5-MoE.")]
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
}

/// A layout of ragged experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// This project's: opens with these crates.
    Ragged,
    /// That of the vLLM plugin.
    FlatRagged,
}

/// Reads the one and writes the other; text to print.
///
/// # Errors
/// A directory that is in neither layout, a model that the other cannot hold, an output that exists.
pub fn run(arguments: &Arguments) -> Result<String> {
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
    Ok(format!("{}: {}\n", arguments.out.display(), format::size(bytes)))
}
