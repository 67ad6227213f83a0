//! The command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use moe::recipe::Named;
use moe_checkpoint::{BasePrecision, Mtp};
use moe_core::Precision;
use moe_core::data::Source;
use moe_core::train::Decay;
use moe_peft::fold::FoldPrecision;

use crate::{Error, Result, TINY_MOE, cli};

/// Where results go if nothing is said: replaced by the next run that says nothing.
pub const DEFAULT_OUT: &str = "out/finetune_qwen";

/// Fine-tunes a Mixture-of-Experts model, by any method or by several side by side, and measures what it learnt and
/// what it forgot.
///
/// Without arguments it teaches a small bundled model division, which it has never seen, by several methods. With
/// --model and --data it runs one method (--method or --recipe) on them and writes the result.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "finetune_qwen",
    after_help = "Examples:\n  moe tune --model DIR --data rows.jsonl --method lora --out OUT\n  \
moe tune --model DIR --data rows.jsonl --eval rows_test.jsonl --method '{\"type\": \"lora\", \"r\": 8}' --epochs 2 --out OUT"
)]
pub struct Arguments {
    /// Hugging Face model directory [default: the bundled tiny-moe]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Rows to train on: .jsonl with prompt and completion, text, messages or input_ids; or .txt; repeatable. Several
    /// are read one after the other, or in shares by weights, as in a.jsonl=2
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    pub data: Vec<Source>,
    /// Rows to measure on, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// A method by name, a list of names with commas, JSON such as {"type": "lora", "r": 8}, or a JSON file of a
    /// method, such as adapter_config.json of PEFT; repeatable; `list` prints the names [default without --model:
    /// several]
    #[arg(long, value_name = "NAME|JSON|FILE", value_parser = methods)]
    pub method: Vec<Methods>,
    /// A method with its options as JSON or a JSON file: {"type": "lora", "r": 8}, or {"method": …, "train": …}, as
    /// `recipe.json` of an earlier run has it
    #[arg(long, value_name = "JSON|FILE", conflicts_with = "method", value_parser = Named::parse)]
    pub recipe: Option<Named>,
    /// First drop half of the units of the routed experts, then train what is left
    #[arg(long)]
    pub recover: bool,
    /// Round the base to this while it is trained on, and keep it packed in memory (QLoRA): nf4, int4, int8, fp8, mxfp4
    /// or nvfp4. A model that is quantized already is kept packed as it is
    #[arg(long, value_name = "NAME", value_parser = base_precision)]
    pub base_precision: Option<BasePrecision>,
    /// What quantized weights become in what is written: bf16, or as-base for the format of the base
    #[arg(long, value_name = "PRECISION", default_value = "bf16", value_parser = fold_precision)]
    pub fold: FoldPrecision,
    /// With --recover, what becomes of layers that predict further tokens, in models that have them: drop or prune
    #[arg(long)]
    pub mtp: Option<Mtp>,
    /// Directory for everything that is written [default: out/finetune_qwen, replacing an earlier run there]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Optimizer steps, instead of those of the method's recipe
    #[arg(long, value_name = "STEPS")]
    pub steps: Option<NonZeroUsize>,
    /// Passes over the rows, instead of those of the method's recipe
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    pub epochs: Option<NonZeroUsize>,
    /// Highest learning rate, instead of that of the method's recipe
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Share of the steps in which the rate rises, in [0, 1], instead of that of the method's recipe
    #[arg(long, value_name = "SHARE")]
    pub warmup: Option<f64>,
    /// How the rate falls, instead of as in the method's recipe: constant, linear, cosine …
    #[arg(long, value_name = "NAME", value_parser = decay)]
    pub decay: Option<Decay>,
    /// Batches of --step-tokens whose gradients make a step
    #[arg(long, value_name = "N")]
    pub accumulate: Option<NonZeroUsize>,
    /// Steps between evaluations on a twentieth of the rows, which is not trained on; the best values are kept
    #[arg(long, value_name = "STEPS")]
    pub evaluate_every: Option<NonZeroUsize>,
    /// Stop after as many evaluations in a row without a better one
    #[arg(long, value_name = "N", requires = "evaluate_every")]
    pub patience: Option<NonZeroUsize>,
    /// Tokens of a step, about
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = cli::non_zero)]
    pub step_tokens: NonZeroUsize,
    /// Count prompts in the loss as well, not completions alone
    #[arg(long)]
    pub loss_over_prompts: bool,
    /// How rows are read
    #[command(flatten)]
    pub rows: cli::RowArguments,
    /// Do not end completions with the end-of-sequence token
    #[arg(long)]
    pub no_eos: bool,
    /// Training rows, at most
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true, value_parser = cli::at_least(1))]
    pub samples: usize,
    /// Field of the rows that has their label, for methods that go by task or type of a row
    #[arg(long, value_name = "FIELD")]
    pub labels: Option<String>,
    /// Tokens of a row, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Seed of the order of rows, of new adapters and of draws of layers [default: those of the recipe, or 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Steps between saved states
    #[arg(long, value_name = "STEPS", default_value = "50", value_parser = cli::non_zero)]
    pub save_every: NonZeroUsize,
    /// Rows per evaluation file, at most
    #[arg(long, value_name = "ROWS", default_value_t = 200, value_parser = cli::at_least(1))]
    pub eval_rows: usize,
    /// Memory to stay within, such as 2GiB; does not change results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan, cuda, or default: the fastest that is compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// f32, or bf16: activations are rounded once per product, where the processor multiplies pairs of bf16
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: Precision,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Go on with what an interrupted run left in the output directory
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace the output of an earlier run
    #[arg(long)]
    pub force: bool,
}

impl Arguments {
    /// The model's directory.
    pub fn model_dir(&self) -> PathBuf {
        self.model.clone().unwrap_or_else(|| PathBuf::from(TINY_MOE))
    }

    /// The rows to train on, and whether they are text without prompts.
    ///
    /// # Errors
    /// [`Error::Usage`] for a model of one's own without any.
    pub fn data_files(&self) -> Result<Vec<(Vec<Source>, bool)>> {
        let bundled = |name: &str| vec![Source { path: PathBuf::from(TINY_MOE).join("data").join(name), weight: None }];
        match (self.data.is_empty(), &self.model, self.recover) {
            (false, ..) => Ok(vec![(self.data.clone(), false)]),
            (true, None, false) => Ok(vec![(bundled("division_train.jsonl"), false)]),
            (true, None, true) => {
                let rows = [("arithmetic", false), ("facts", false), ("prose", true)];
                Ok(rows.map(|(name, text)| (bundled(&format!("{name}_calibration.jsonl")), text)).into())
            }
            (true, Some(_), _) => Err(Error::Usage("--model needs --data FILE: rows to train on".into())),
        }
    }

    /// The rows to measure on; for the bundled model, all it can and what it is to learn.
    pub fn eval_files(&self) -> Vec<PathBuf> {
        let first = if self.recover { None } else { Some("division") };
        let bundled = first.into_iter().chain(["arithmetic", "facts", "prose"]);
        match self.eval.is_empty() && self.model.is_none() {
            true => bundled.map(|name| PathBuf::from(TINY_MOE).join(format!("data/{name}_test.jsonl"))).collect(),
            false => self.eval.clone(),
        }
    }

    /// The output directory.
    pub fn out_dir(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_OUT))
    }
}

/// What a base is rounded to.
fn base_precision(text: &str) -> std::result::Result<BasePrecision, String> {
    text.parse().map_err(|error: moe_checkpoint::Error| error.to_string())
}

/// What quantized weights become.
fn fold_precision(text: &str) -> std::result::Result<FoldPrecision, String> {
    match text {
        "bf16" => Ok(FoldPrecision::Bf16),
        "as-base" => Ok(FoldPrecision::AsBase),
        _ => Err("expected bf16 or as-base".into()),
    }
}

/// What one `--method` names: names and files, or a method as JSON.
pub type Methods = Vec<String>;

fn methods(text: &str) -> Result<Methods> {
    Ok(match text.trim_start().starts_with('{') {
        true => vec![text.to_string()],
        false => text.split(',').map(|name| name.trim().to_string()).collect(),
    })
}

/// How a learning rate falls.
fn decay(text: &str) -> std::result::Result<Decay, String> {
    let value = if text.starts_with('{') { serde_json::from_str(text) } else { Ok(serde_json::json!(text)) };
    value.and_then(serde_json::from_value).map_err(|error| error.to_string())
}
