//! The study of `adaptive_study`, and its tables in the guide.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::{Result, at, root, study};

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
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--release", "--example", "adaptive_study", "--", "--out"]).arg(&options.out);
    if let Some(draws) = options.draws {
        command.args(["--draws", &draws.to_string()]);
    }
    if !command.current_dir(root()).status()?.success() {
        return Err("the study failed".into());
    }
    if options.write {
        let (page, tables) = (root().join(PAGE), root().join(&options.out));
        let read = |path: &PathBuf| fs::read_to_string(path).map_err(at(path));
        let written = study::replace(&read(&page)?, &read(&tables)?).map_err(at(&page))?;
        fs::write(&page, written).map_err(at(&page))?;
        println!("{PAGE}: written");
    }
    Ok(())
}
