//! A model that is run in another way, with the same weights.

use std::path::PathBuf;

use clap::Parser;
use moe::recipe::{Adapt, Data, Evaluate, Named, Norms, Recipe, Step, Write};
use moe::run::{RunOptions, run as run_recipe};
use moe_core::Precision;
use moe_core::data::{LossOver, Source};
use moe_core::depth::{DepthConfig, LayerChoice};

use crate::progress::Progress;
use crate::{Error, Result};

/// Changes how a model is run, without other weights: experts per token, layers, decoding, norms
///
/// What stock loaders can read goes into OUT/model itself: one number of experts per token, layers that are taken out,
/// scaled norms. The rest is run_time.json beside it, which every verb that runs the model follows.
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe adapt --model DIR --routing '{\"type\": \"top_p\", \"experts\": 3}' --data rows.jsonl --out OUT\n  \
moe adapt --model DIR --drop '{\"type\": \"angular\", \"layers\": 2}' --data rows.jsonl --out OUT\n  \
moe adapt --model DIR --layers layer_routers --data answers.jsonl --out OUT\n  \
moe adapt --model DIR --decoding pathways --data answers.jsonl --out OUT\n\n\
docs/adaptive.md has all rules."
)]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// How tokens are routed: a rule by its name, as JSON, or in a .json file
    #[arg(long, value_name = "RULE")]
    pub routing: Option<String>,
    /// Layers that tokens go through, in order, such as 0-3,5,5,6a; or token_skip or layer_routers, by name, as JSON,
    /// or in a .json file
    #[arg(long, value_name = "LAYERS", conflicts_with = "drop")]
    pub layers: Option<String>,
    /// Layers that are taken out: influence, angular, attention_rank or deepest with their number, or a list, as JSON
    /// or in a .json file
    #[arg(long, value_name = "CHOICE")]
    pub drop: Option<String>,
    /// How the next token is found: self_contrast, rewiring or pathways, by name, as JSON, or in a .json file
    #[arg(long, value_name = "DECODING")]
    pub decoding: Option<String>,
    /// How norms are written: fold runs LayerNorms as RMSNorms, scale folds LayerNorm scaling into plain weights
    #[arg(long, value_name = "HOW", value_parser = norms)]
    pub norms: Option<Norms>,
    /// Rows that thresholds, layers, routers and references are found on; repeatable. Several share the samples evenly,
    /// or by weights, as in a.jsonl=2
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    pub data: Vec<Source>,
    /// Sequences of these, at most
    #[arg(long, default_value_t = 128, value_parser = crate::cli::at_least(1))]
    pub samples: usize,
    /// Tokens per sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = crate::cli::at_least(2))]
    pub length: usize,
    /// Rows to measure on before and after, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// Directory for everything: the model in OUT/model, what was found in OUT/steps
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<String>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// f32, or bf16: activations are rounded once per product, where the processor multiplies pairs of bf16
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: Precision,
    /// Check everything and do nothing
    #[arg(long)]
    pub check: bool,
    /// Go on in OUT; what has not changed is reused
    #[arg(long)]
    pub resume: bool,
    /// Replace a model that an earlier run wrote
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

fn norms(name: &str) -> std::result::Result<Norms, String> {
    serde_json::from_value(serde_json::Value::from(name)).map_err(|_| "expected fold or scale".into())
}

/// A path of layers, or a rule by its name or as JSON.
fn layers(text: &str) -> Result<DepthConfig> {
    match Named::parse(text).map_err(Error::Usage)? {
        Named::Name(path) if path.starts_with(|c: char| c.is_ascii_digit()) => Ok(path.parse::<DepthConfig>()?),
        rule => rule.read("type", "--layers"),
    }
}

/// Checks everything, finds what is to be found, and writes; text to print.
///
/// # Errors
/// Whatever is wrong with the arguments and files, before the model is run; whatever stops it.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<String> {
    let named = |text: &Option<String>| text.as_deref().map(Named::parse).transpose().map_err(Error::Usage);
    let drop = named(&arguments.drop)?.map(|choice| choice.read::<LayerChoice>("type", "--drop")).transpose()?;
    let adapt = Adapt {
        routing: named(&arguments.routing)?,
        layers: arguments.layers.as_deref().map(layers).transpose()?,
        drop,
        decoding: named(&arguments.decoding)?,
        norms: arguments.norms,
    };
    let answers = adapt.run_time()?.needs_answers();
    if !arguments.data.is_empty() && !adapt.needs_rows()? {
        return Err(Error::Usage("--data: nothing of what is asked for is found on rows".into()));
    }
    let mut steps = vec![Step::Adapt(Box::new(adapt)), Step::Write(Write::default())];
    if !arguments.eval.is_empty() {
        steps.insert(0, Step::Evaluate(Evaluate::default()));
        steps.insert(2, Step::Evaluate(Evaluate::default()));
    }
    let recipe = Recipe {
        about: String::new(),
        model: arguments.model.clone(),
        data: Data {
            calibration: crate::cli::data_files(&arguments.data),
            eval: arguments.eval.clone(),
            samples: arguments.samples,
            length: arguments.length,
            loss: if answers { LossOver::Completions } else { LossOver::All },
            ..Data::default()
        },
        out: arguments.out.clone(),
        seed: 0,
        max_memory: arguments.max_memory.clone(),
        precision: arguments.precision,
        device: arguments.device.clone(),
        steps,
    };
    crate::cli::allocator(recipe.max_memory.as_ref().map(|_| 0));
    let Arguments { check, resume, force, json, .. } = *arguments;
    let options = RunOptions { resume, force, check, ..RunOptions::new(progress) };
    crate::cli::shown(&run_recipe(&recipe, options)?, json)
}
