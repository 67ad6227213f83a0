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
    /// Model directory with rows in its folder `data`, instead of the bundled one
    #[arg(long, value_name = "DIR", requires = "name")]
    model: Option<PathBuf>,
    /// What the tables of that model are called: adaptive-NAME-routing and so on
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Write the tables into docs/adaptive.md
    #[arg(long)]
    write: bool,
}

/// Runs the study, and writes its tables into the page if asked to.
pub fn run(options: &Options) -> Result<()> {
    let model = options.model.as_ref().map(std::path::absolute).transpose()?;
    let flags = [
        ("--draws", options.draws.map(|draws| draws.to_string())),
        ("--model", model.map(|model| model.display().to_string())),
        ("--name", options.name.clone()),
    ];
    study::tables("adaptive_study", PAGE, &options.out, &flags, options.write)
}
