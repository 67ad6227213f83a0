//! Pruning from the command line: a recipe made of flags.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Parser;
use moe::recipe::{self, Data, DataFile, Evaluate, Form, Named, Prune, Recipe, Repair, Score, Step, Write};
use moe::run::{RunOptions, RunReport, run as run_recipe};
use moe_checkpoint::Mtp;
use moe_prune::Budget;
use serde_json::{Map, Value, json};

use crate::progress::Progress;
use crate::{Error, Result, cli};

/// Drops units or whole experts by scores, repairs what is left, and writes the smaller model
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe prune --model DIR --data rows.jsonl --scorer fisher --ratio 0.5 --out OUT\n  \
moe prune --model DIR --scores scores/reap.safetensors --pruner expert --ratio 0.25 --data rows.jsonl --repair refit --out OUT\n  \
moe prune --model DIR --scores fisher.safetensors --ratio 0.5 --form ragged --out OUT"
)]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Scores that moe score wrote; the model is not run for them again
    #[arg(long, value_name = "FILE", conflicts_with = "scorer")]
    pub scores: Option<PathBuf>,
    /// Rows to score, repair and choose a form on; repeatable
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Scorer, a name or JSON [default: fisher]
    #[arg(long, value_name = "NAME|JSON", value_parser = Named::parse)]
    pub scorer: Option<Named>,
    /// Fraction of the routed experts' units to drop
    #[arg(long, value_parser = cli::ratio, group = "budget")]
    pub ratio: Option<f64>,
    /// Parameters of routed experts to keep, at most
    #[arg(long, value_name = "N", group = "budget")]
    pub keep_parameters: Option<u64>,
    /// What decides, a name or JSON: unit, expert, novice, subset, two_level, wide
    #[arg(long, value_name = "NAME|JSON", value_parser = Named::parse)]
    pub pruner: Option<Named>,
    /// How much each layer keeps, a name or JSON: uniform, global, layer, knapsack …
    #[arg(long, value_name = "NAME|JSON", value_parser = Named::parse)]
    pub allocator: Option<Named>,
    /// Widths are multiples of this
    #[arg(long, value_name = "N")]
    pub round_to: Option<usize>,
    /// Units that every expert keeps at least
    #[arg(long, value_name = "N")]
    pub min_width: Option<usize>,
    /// Experts or units that stay whatever they score, as moe score --super-experts writes them
    #[arg(long, value_name = "FILE")]
    pub protect: Option<PathBuf>,
    /// Improve what is left: refit, layer_refit, mean_output, router_distillation, a name or JSON; repeatable, in order
    #[arg(long, value_name = "NAME|JSON", value_parser = Named::parse)]
    pub repair: Vec<Named>,
    /// Layers that predict further tokens: keep, drop or prune
    #[arg(long, value_parser = mtp)]
    pub mtp: Option<Mtp>,
    /// auto, uniform, fine_grained (these load in stock runtimes), ragged (these crates), masked (zeros, saves nothing)
    #[arg(long, default_value = "auto", value_parser = form)]
    pub form: Form,
    /// Pieces of an expert, in the form fine_grained
    #[arg(long, value_name = "N")]
    pub pieces: Option<usize>,
    /// Rows to measure before and after, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// New directory for the model; artifacts go beside it, to OUT.steps
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Plan only: nothing is written but OUT.steps
    #[arg(long)]
    pub plan_only: bool,
    /// Sequences to calibrate on, at most
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(1))]
    pub samples: usize,
    /// Tokens per sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Shuffle rows with this seed
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokens that go through the model together
    #[arg(long, default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long)]
    pub max_memory: Option<String>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// Go on with what an interrupted run left
    #[arg(long)]
    pub resume: bool,
    /// Replace an output that is there
    #[arg(long)]
    pub force: bool,
    /// Check everything and do nothing
    #[arg(long)]
    pub check: bool,
    /// Print the recipe instead of carrying it out: what moe run takes
    #[arg(long)]
    pub recipe: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What a form is called.
///
/// # Errors
/// A message with the forms there are.
pub fn form(text: &str) -> Result<Form, String> {
    serde_json::from_value(Value::String(text.replace('-', "_")))
        .map_err(|_| format!("found `{text}`, expected auto, uniform, fine_grained, ragged or masked"))
}

/// What the choice for layers that predict further tokens is called.
///
/// # Errors
/// A message with the choices there are.
pub fn mtp(text: &str) -> Result<Mtp, String> {
    serde_json::from_value(Value::String(text.into()))
        .map_err(|_| format!("found `{text}`, expected keep, drop or prune"))
}

impl Arguments {
    /// The recipe that the flags say.
    ///
    /// # Errors
    /// [`Error::Usage`] for flags that do not go together.
    pub fn to_recipe(&self) -> Result<Recipe> {
        let budget = match (self.ratio, self.keep_parameters) {
            (Some(ratio), _) => Budget::Ratio(ratio),
            (_, Some(count)) => Budget::KeepParameters(count),
            _ => return Err(Error::Usage("--ratio or --keep-parameters: one says how much is kept".into())),
        };
        let mut steps = Vec::new();
        if !self.eval.is_empty() {
            steps.push(Step::Evaluate(Evaluate::default()));
        }
        if self.scores.is_none() {
            let scorer = self.scorer.clone().unwrap_or_else(|| Named::Name("fisher".into()));
            steps.push(Step::Score(Score { scorers: vec![scorer], super_experts: None }));
        }
        if let Some(path) = &self.protect {
            steps.push(Step::Protect(recipe::Protect::File(path.clone())));
        }
        let (scores, mtp, form, pieces) = (self.scores.clone(), self.mtp, self.form, self.pieces);
        let pruner = self.pruner()?;
        steps.push(Step::Prune(Prune { scores, budget: Some(budget), pruner, mtp, form, pieces, ..Prune::default() }));
        for repair in &self.repair {
            steps.push(Step::Repair(repair.read::<Repair>("type", "repair")?));
        }
        if !self.eval.is_empty() {
            steps.push(Step::Evaluate(Evaluate::default()));
        }
        if !self.plan_only {
            steps.push(Step::Write(Write { to: Some(self.out.clone()), shard_size: None }));
        }
        let mut work = self.out.clone().into_os_string();
        work.push(".steps");
        Ok(Recipe {
            about: String::new(),
            model: self.model.clone(),
            data: Data {
                calibration: self.data.iter().cloned().map(DataFile::Path).collect(),
                eval: self.eval.clone(),
                samples: self.samples,
                length: self.length,
                wave_tokens: self.wave_tokens,
                ..Data::default()
            },
            out: work.into(),
            seed: self.seed,
            max_memory: self.max_memory.clone(),
            device: self.device.clone(),
            steps,
        })
    }

    /// The pruner with what other flags say of it; none if nothing is said.
    fn pruner(&self) -> Result<Option<Named>> {
        let mut object = match &self.pruner {
            None if self.allocator.is_none() && self.round_to.is_none() && self.min_width.is_none() => return Ok(None),
            None => Map::from_iter([("type".to_string(), json!("unit"))]),
            Some(Named::Name(name)) => Map::from_iter([("type".to_string(), json!(name))]),
            Some(Named::Parameters(map)) => map.clone(),
        };
        if let Some(allocator) = &self.allocator {
            let allocator = match allocator {
                Named::Name(name) => json!({ "type": name }),
                Named::Parameters(map) => Value::Object(map.clone()),
            };
            object.insert("allocator".into(), allocator);
        }
        for (key, value) in [("round_to", self.round_to), ("min_width", self.min_width)] {
            if let Some(value) = value {
                object.insert(key.into(), json!(value));
            }
        }
        Ok(Some(Named::Parameters(object)))
    }
}

/// Makes the recipe and carries it out; text to print.
///
/// # Errors
/// Whatever is wrong with the flags and the files they name, before the first step; whatever stops a step.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<String> {
    let recipe = arguments.to_recipe()?;
    if arguments.recipe {
        let json = serde_json::to_string_pretty(&recipe);
        return json.map(|json| format!("{json}\n")).map_err(|error| Error::Invalid(error.to_string()));
    }
    cli::allocator(recipe.max_memory.as_ref().map(|_| 0));
    let Arguments { resume, force, check, .. } = *arguments;
    let resume = resume || force;
    let report: RunReport = run_recipe(&recipe, RunOptions { resume, force, check, progress })?;
    cli::shown(&report, arguments.json)
}
