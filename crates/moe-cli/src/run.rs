//! A whole job from one file.

use std::path::{Path, PathBuf};

use clap::Parser;
use moe::recipe::{Evaluate, Recipe, Step};
use moe::run::{RunOptions, run as run_recipe};
use moe_checkpoint::group::Group;
use moe_core::Precision;
use moe_core::data::Source;

use crate::progress::Progress;
use crate::{Error, Result};

/// Carries out a recipe: any chain of scoring, protection, pruning, merging, repairs, fine-tuning, measurements and
/// writing, as one JSON file
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe run recipe.json --resume\n  moe run reap-25 --model DIR --data rows.jsonl --out OUT\n\nA step's artifact is kept in OUT/steps and reused while nothing that \
it follows from changes, also when other steps of the recipe do."
)]
pub struct Arguments {
    /// The recipe: a JSON file, JSON, or the name of a published one; `list` tells what there is
    #[arg(required_unless_present = "schema")]
    pub recipe: Option<String>,
    /// Print the JSON Schema of recipes, for editors
    #[arg(long)]
    pub schema: bool,
    /// Model directory, instead of the recipe's
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Rows to calibrate on, instead of the recipe's; repeatable. Several share the samples evenly, or by weights, as
    /// in a.jsonl=2
    #[arg(long, visible_alias = "calibration", value_name = "FILE[=WEIGHT]")]
    pub data: Vec<Source>,
    /// Sequences to calibrate on, at most, instead of the recipe's number
    #[arg(long, value_parser = crate::cli::at_least(1))]
    pub samples: Option<usize>,
    /// Tokens per sequence, at most, instead of the recipe's number
    #[arg(long, value_parser = crate::cli::at_least(2))]
    pub length: Option<usize>,
    /// Memory to stay within, such as 8GiB, instead of the recipe's; never changes results
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<String>,
    /// f32, or bf16, instead of the recipe's: activations are rounded once per product, where the processor multiplies
    /// pairs of bf16
    #[arg(long, value_name = "f32|bf16")]
    pub precision: Option<Precision>,
    /// Rows to measure on before the first and after the last change, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// Directory for everything, instead of the recipe's
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Check everything, tell what each step will take, and do nothing
    #[arg(long)]
    pub check: bool,
    /// Go on in the recipe's output directory; what has not changed is reused
    #[arg(long)]
    pub resume: bool,
    /// Replace a model that an earlier run wrote
    #[arg(long)]
    pub force: bool,
    /// How the work is shared with other processes
    #[command(flatten)]
    pub share: crate::cli::ShareArguments,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// Reads and carries out the recipe; text to print.
///
/// # Errors
/// Whatever is wrong with it, before the first step; whatever stops a step.
pub fn run(arguments: &Arguments, group: &dyn Group, progress: Progress) -> Result<String> {
    if arguments.schema {
        return Ok(format!("{:#}\n", Recipe::schema()));
    }
    let name = arguments.recipe.as_deref().unwrap_or("list");
    if name == "list" {
        let mut table = crate::table::Table::new(["recipe", "what it does"], 2);
        for name in Recipe::names() {
            table.row([name.to_string(), Recipe::published(name)?.about]);
        }
        return Ok(format!("{}\n", table.to_text_within(crate::cli::COLUMNS)));
    }
    let mut recipe = match (name.trim_start().starts_with('{'), Path::new(name).exists()) {
        (true, _) => serde_json::from_str(name).map_err(|error| Error::Usage(format!("the recipe: {error}")))?,
        (false, true) => Recipe::load(name)?,
        (false, false) => Recipe::published(name)?,
    };
    if let Some(model) = &arguments.model {
        recipe.model.clone_from(model);
    }
    if let Some(out) = &arguments.out {
        recipe.out.clone_from(out);
    }
    if !arguments.data.is_empty() {
        recipe.data.calibration = crate::cli::data_files(&arguments.data);
    }
    recipe.data.samples = arguments.samples.unwrap_or(recipe.data.samples);
    recipe.data.length = arguments.length.unwrap_or(recipe.data.length);
    recipe.max_memory = arguments.max_memory.clone().or(recipe.max_memory);
    recipe.precision = arguments.precision.unwrap_or(recipe.precision);
    if !arguments.eval.is_empty() {
        recipe.data.eval.clone_from(&arguments.eval);
        if !recipe.steps.iter().any(|step| matches!(step, Step::Evaluate(_))) {
            recipe.steps.insert(0, Step::Evaluate(Evaluate::default()));
            let last = recipe.steps.iter().rposition(|step| !matches!(step, Step::Write(_))).unwrap_or(0);
            recipe.steps.insert(last + 1, Step::Evaluate(Evaluate::default()));
        }
    }
    crate::cli::allocator(recipe.max_memory.as_ref().map(|_| 0));
    let Arguments { check, resume, force, json, .. } = *arguments;
    let (shard, absorb) = (arguments.share.shard, &arguments.share.absorb);
    crate::cli::shown(&run_recipe(&recipe, RunOptions { resume, force, check, progress, shard, absorb, group })?, json)
}
