//! Pruning from the command line: a recipe made of flags.

use std::path::{Path, PathBuf};

use clap::Parser;
use moe::recipe::{self, Evaluate, Form, Named, Prune, Recipe, Repair, Score, Step, Write};
use moe::run::{RunOptions, RunReport, run as run_recipe};
use moe_checkpoint::Mtp;
use moe_checkpoint::group::Group;
use moe_core::Precision;
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
    /// What is scored, repaired, probed and chosen a form on
    #[command(flatten)]
    pub data: cli::DataArguments,
    /// Scorer, a name, JSON or a JSON file [default: fisher, or reap where whole experts go]; auto: of fisher, taylor,
    /// coupled and heapr the one whose pruned model stays closest to the full one on held-back rows of --data
    #[arg(long, value_name = "NAME|JSON|FILE", value_parser = Named::parse)]
    pub scorer: Option<Named>,
    /// Fraction of the routed experts' units to drop
    #[arg(long, value_parser = cli::ratio, group = "budget")]
    pub ratio: Option<f64>,
    /// Parameters of routed experts to keep, at most
    #[arg(long, value_name = "N", group = "budget")]
    pub keep_parameters: Option<u64>,
    /// Bytes of the whole checkpoint to keep, at most, such as 24GB
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes, group = "budget")]
    pub keep_bytes: Option<u64>,
    /// Experts that every layer keeps; the others go whole
    #[arg(long, value_name = "N", value_parser = cli::at_least(1), group = "budget")]
    pub experts_per_layer: Option<usize>,
    /// What stays, chosen by hand, in the form of --protect: of the layers that the file names all other experts go
    #[arg(long, value_name = "FILE", group = "budget", conflicts_with_all = ["scores", "scorer", "pruner", "allocator", "protect"])]
    pub keep_list: Option<PathBuf>,
    /// What decides, a name or JSON: unit, expert, novice, subset, genetic, two_level, wide
    #[arg(long, value_name = "NAME|JSON|FILE", value_parser = Named::parse)]
    pub pruner: Option<Named>,
    /// How much each layer keeps, a name or JSON: uniform, layer, global, normalized, hybrid, depth_prior,
    /// rate_distortion, rco or evolution; the last three ask the running model, on --data
    #[arg(long, value_name = "NAME|JSON|FILE", value_parser = Named::parse)]
    pub allocator: Option<Named>,
    /// Widths are multiples of this
    #[arg(long, value_name = "N")]
    pub round_to: Option<usize>,
    /// Units that every expert keeps at least
    #[arg(long, value_name = "N")]
    pub min_width: Option<usize>,
    /// Every layer keeps a multiple of this many experts, for serving on as many devices
    #[arg(long, value_name = "N", value_parser = cli::at_least(1))]
    pub multiple_of: Option<usize>,
    /// Experts or units that stay whatever they score, as moe score --super-experts writes them
    #[arg(long, value_name = "FILE")]
    pub protect: Option<PathBuf>,
    /// Improve what is left: refit, layer_refit, mean_output, router_distillation, a name or JSON; repeatable, in order
    #[arg(long, value_name = "NAME|JSON|FILE", value_parser = Named::parse)]
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
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long)]
    pub max_memory: Option<String>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// f32, or bf16: activations are rounded once per product, where the processor multiplies pairs of bf16
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: Precision,
    /// Go on with what an interrupted run left
    #[arg(long)]
    pub resume: bool,
    /// Replace an output that is there
    #[arg(long)]
    pub force: bool,
    /// How the work is shared with other processes
    #[command(flatten)]
    pub share: cli::ShareArguments,
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
        let budget = match (self.ratio, self.keep_parameters, self.keep_bytes, self.experts_per_layer) {
            (Some(ratio), ..) => Some(Budget::Ratio(ratio)),
            (_, Some(count), ..) => Some(Budget::KeepParameters(count)),
            (_, _, Some(count), _) => Some(Budget::KeepBytes(count)),
            (.., Some(count)) => Some(Budget::ExpertsPerLayer(count)),
            _ if self.keep_list.is_some() => None,
            _ => {
                return Err(Error::Usage(
                    "--ratio, --keep-parameters, --keep-bytes, --experts-per-layer or --keep-list: one says how much is kept".into(),
                ));
            }
        };
        let mut steps = Vec::new();
        if !self.eval.is_empty() {
            steps.push(Step::Evaluate(Evaluate::default()));
        }
        let (pruner, mut scores) = (self.pruner()?, self.scores.clone());
        if self.scores.is_none() && self.keep_list.is_none() {
            let whole = pruner.as_ref().is_some_and(|pruner| WHOLE.contains(&kind(&pruner.object("type"))));
            let default = if whole { "reap" } else { "fisher" };
            let scorer = self.scorer.clone().unwrap_or_else(|| Named::Name(default.into()));
            let scorers = match (&scorer, whole || self.experts_per_layer.is_some() || self.multiple_of.is_some()) {
                (Named::Name(name), true) if name == Prune::AUTO => {
                    let reason = "auto chooses among scorers of units, but whole experts go; name a scorer";
                    return Err(Error::Usage(format!("--scorer: {reason}")));
                }
                (Named::Name(name), false) if name == Prune::AUTO => {
                    scores = Some(Prune::AUTO.into());
                    CHOICES.into_iter().map(|name| Named::Name(name.into())).collect()
                }
                _ => vec![scorer],
            };
            steps.push(Step::Score(Score { scorers, super_experts: None }));
        }
        if let Some(path) = &self.protect {
            steps.push(Step::Protect(recipe::Protect::File(path.clone())));
        }
        let keep_list = self.keep_list.clone();
        let (mtp, form, pieces) = (self.mtp, self.form, self.pieces);
        steps.push(Step::Prune(Prune { scores, budget, pruner, keep_list, mtp, form, pieces, ..Prune::default() }));
        for repair in &self.repair {
            steps.push(Step::Repair(repair.read::<Repair>("type", "repair")?));
        }
        if !self.eval.is_empty() {
            steps.push(Step::Evaluate(Evaluate::default()));
        }
        if !self.plan_only {
            steps.push(Step::Write(Write { to: Some(self.out.clone()), shard_size: None }));
        }
        Ok(Recipe {
            about: String::new(),
            model: self.model.clone(),
            data: self.data.to_recipe(&self.eval),
            out: steps_of(&self.out),
            seed: self.data.seed.unwrap_or_default(),
            max_memory: self.max_memory.clone(),
            precision: self.precision,
            device: self.device.clone(),
            steps,
        })
    }

    /// The pruner with what other flags say of it; none if nothing is said.
    fn pruner(&self) -> Result<Option<Named>> {
        let limits = [("round_to", self.round_to), ("min_width", self.min_width)];
        let limits: Map<String, Value> =
            limits.into_iter().filter_map(|(key, value)| Some((key.to_string(), json!(value?)))).collect();
        let whole = self.multiple_of.is_some() || self.experts_per_layer.is_some();
        let said = self.allocator.is_some() || whole || !limits.is_empty();
        let mut object = match &self.pruner {
            None if !said => return Ok(None),
            None => Map::from_iter([("type".to_string(), json!(if whole { "expert" } else { "unit" }))]),
            Some(pruner) => pruner.object("type"),
        };
        let name = kind(&object).to_string();
        if name == "two_level" {
            // A pruner of units has no allocator of its own.
            let units = object.entry("units").or_insert_with(|| json!({ "allocator": { "type": "global" } }));
            let Value::Object(units) = units else {
                return Err(Error::Usage(format!("--pruner: units is {units}, expected an object")));
            };
            self.fill(units, limits)?;
            if let Some(multiple) = self.multiple_of {
                let experts = object.entry("experts").or_insert_with(|| json!({}));
                experts["multiple_of"] = json!(multiple);
            }
            return Ok(Some(Named::Parameters(object)));
        }
        if !limits.is_empty() && WHOLE.contains(&name.as_str()) {
            return Err(Error::Usage(format!(
                "--round-to, --min-width: widths stay as they are where pruner `{name}` drops whole experts"
            )));
        }
        if self.multiple_of.is_some() && !["expert", "subset", "genetic"].contains(&name.as_str()) {
            return Err(Error::Usage(format!(
                "--multiple-of: pruner `{name}` leaves as many experts as there are; expert, subset, genetic and two_level do not"
            )));
        }
        self.fill(&mut object, limits)?;
        if let Some(multiple) = self.multiple_of {
            object.insert("multiple_of".into(), json!(multiple));
        }
        Ok(Some(Named::Parameters(object)))
    }

    /// Puts the allocator and limits of widths into a pruner.
    fn fill(&self, object: &mut Map<String, Value>, limits: Map<String, Value>) -> Result<()> {
        if let Some(allocator) = &self.allocator {
            object.insert("allocator".into(), Value::Object(allocator.object("type")));
        }
        if !limits.is_empty() {
            match object.entry("limits").or_insert_with(|| json!({})) {
                Value::Object(found) => found.extend(limits),
                other => return Err(Error::Usage(format!("--pruner: limits is {other}, expected an object"))),
            }
        }
        Ok(())
    }
}

/// Scorers that `--scorer auto` chooses from, the default first.
const CHOICES: [&str; 4] = ["fisher", "taylor", "coupled", "heapr"];

/// Pruners that drop whole experts.
const WHOLE: [&str; 4] = ["expert", "novice", "subset", "genetic"];

/// What a pruner is called.
fn kind(pruner: &Map<String, Value>) -> &str {
    pruner.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Where the artifacts of a run go.
fn steps_of(out: &Path) -> PathBuf {
    let mut steps = out.as_os_str().to_os_string();
    steps.push(".steps");
    steps.into()
}

/// Makes the recipe and carries it out; text to print.
///
/// # Errors
/// Whatever is wrong with the flags and the files they name, before the first step; whatever stops a step.
pub fn run(arguments: &Arguments, group: &dyn Group, progress: Progress) -> Result<String> {
    let recipe = arguments.to_recipe()?;
    if arguments.recipe {
        let json = serde_json::to_string_pretty(&recipe);
        return json.map(|json| format!("{json}\n")).map_err(|error| Error::Invalid(error.to_string()));
    }
    cli::allocator(recipe.max_memory.as_ref().map(|_| 0));
    let Arguments { resume, force, check, .. } = *arguments;
    let resume = resume || force;
    // What another process did is beside its --out.
    let absorb: Vec<PathBuf> = arguments.share.absorb.iter().map(|out| steps_of(out)).collect();
    let (shard, absorb) = (arguments.share.shard, absorb.as_slice());
    let report: RunReport = run_recipe(&recipe, RunOptions { resume, force, check, progress, shard, absorb, group })?;
    let mut text = cli::shown(&report, arguments.json)?;
    if arguments.plan_only && !arguments.json {
        let plans = report.steps.iter().filter(|step| step.step == "prune").filter_map(|step| step.artifact.as_ref());
        plans.for_each(|dir| text += &format!("{}\n", dir.join("plan.json").display()));
    }
    Ok(text)
}
