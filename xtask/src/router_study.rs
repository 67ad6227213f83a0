//! The study of `router_study`, and its tables in the guide.

use std::path::PathBuf;

use crate::{Result, study};

/// The page with its tables.
const PAGE: &str = "docs/fine-tuning.md";

/// What to run, and what to do with it.
#[derive(clap::Args)]
pub struct Options {
    /// File for the tables
    #[arg(long, value_name = "FILE", default_value = "out/router-study.md")]
    out: PathBuf,
    /// Steps of each way to train
    #[arg(long)]
    steps: Option<u32>,
    /// Write the tables into docs/fine-tuning.md
    #[arg(long)]
    write: bool,
}

/// Runs the study, and writes its tables into the page if asked to.
pub fn run(options: &Options) -> Result<()> {
    study::tables(
        "router_study",
        PAGE,
        &options.out,
        &[("--steps", options.steps.map(|steps| steps.to_string()))],
        options.write,
    )
}
