//! The study of `adaptive_study`, and its tables in the guide.

use std::path::PathBuf;

use crate::{Result, study};

/// The page with its tables.
const PAGE: &str = "docs/adaptive.md";

/// What to run, and what to do with it.
#[derive(clap::Args)]
pub struct Options {
    /// File for the tables
    #[arg(long, value_name = "FILE", default_value = "out/adaptive-study.md")]
    out: PathBuf,
    /// Draws of the rows, instead of three
    #[arg(long, value_name = "N")]
    draws: Option<u32>,
    /// Write the tables into docs/adaptive.md
    #[arg(long)]
    write: bool,
}

/// Runs the study, and writes its tables into the page if asked to.
pub fn run(options: &Options) -> Result<()> {
    study::tables("adaptive_study", PAGE, &options.out, ("--draws", options.draws), options.write)
}
