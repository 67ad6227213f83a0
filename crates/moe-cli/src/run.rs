//! A whole job from one file.

use std::path::{Path, PathBuf};

use clap::Parser;
use moe::recipe::{DataFile, Evaluate, Recipe, Step};
use moe::run::{RunOptions, RunReport, run as run_recipe};

use crate::Result;
use crate::progress::Progress;

/// Carries out a recipe: any chain of scoring, protection, pruning, merging, repairs, measurements and writing, as one JSON file
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe run recipe.json --resume\n  moe run reap-25 --model DIR --data rows.jsonl --out OUT\n\nA step's artifact is kept in OUT/steps and reused while nothing that \
it follows from changes, also when other steps of the recipe do."
)]
pub struct Arguments {
    /// The recipe: a JSON file, or the name of a published one
    pub recipe: String,
    /// Model directory, instead of the recipe's
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Rows to calibrate on, instead of the recipe's; repeatable
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Rows to measure on before the first and after the last change, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// Directory for everything, instead of the recipe's
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Check everything and do nothing
    #[arg(long)]
    pub check: bool,
    /// Go on in the recipe's output directory; what has not changed is reused
    #[arg(long)]
    pub resume: bool,
    /// Replace a model that an earlier run wrote
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// Reads and carries out the recipe.
///
/// # Errors
/// Whatever is wrong with it, before the first step; whatever stops a step.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<RunReport> {
    let mut recipe = match Path::new(&arguments.recipe).exists() {
        true => Recipe::load(&arguments.recipe)?,
        false => Recipe::published(&arguments.recipe)?,
    };
    if let Some(model) = &arguments.model {
        recipe.model.clone_from(model);
    }
    if let Some(out) = &arguments.out {
        recipe.out.clone_from(out);
    }
    if !arguments.data.is_empty() {
        recipe.data.calibration = arguments.data.iter().cloned().map(DataFile::Path).collect();
    }
    if !arguments.eval.is_empty() {
        recipe.data.eval.clone_from(&arguments.eval);
        if !recipe.steps.iter().any(|step| matches!(step, Step::Evaluate(_))) {
            recipe.steps.insert(0, Step::Evaluate(Evaluate::default()));
            let last = recipe.steps.iter().rposition(|step| !matches!(step, Step::Write(_))).unwrap_or(0);
            recipe.steps.insert(last + 1, Step::Evaluate(Evaluate::default()));
        }
    }
    crate::cli::allocator(recipe.max_memory.as_ref().map(|_| 0));
    let Arguments { check, resume, force, .. } = *arguments;
    run_recipe(&recipe, RunOptions { resume, force, check, progress })
}
