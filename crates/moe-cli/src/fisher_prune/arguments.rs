//! The command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use moe_importance::scorers::Criterion;
use moe_prune::{Export, Mtp, Scope};

use crate::{Error, Result, TINY_MOE, cli};

/// Where results go if nothing is said: replaced by the next run that says nothing.
pub const DEFAULT_OUT: &str = "out/fisher_prune_qwen";

/// Scores every FFN unit of the routed experts of a Mixture-of-Experts model, drops the least important ones, writes
/// the smaller checkpoints, and measures what they still can do.
///
/// Without arguments it does so to a small bundled model and compares four other ways to score. With --model it scores
/// with Fisher alone and measures perplexity; --controls and --generate ask for the rest.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "fisher_prune_qwen")]
pub struct Arguments {
    /// Hugging Face model directory, of any family that these crates run [default: the bundled tiny-moe]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Rows to score on: .jsonl with text, prompt and completion, messages or input_ids; or .txt
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Rows to measure on, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// Fisher criterion: token, sequence (squared gradients) or abs (mean absolute gradients)
    #[arg(long, default_value = "token", value_parser = criterion)]
    pub criterion: Criterion,
    /// Units compete within an expert, a layer or the whole model (global)
    #[arg(long, default_value_t = Scope::Global)]
    pub scope: Scope,
    /// Fraction of the units to drop; repeatable, or a list with commas
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.7], value_parser = cli::ratio)]
    pub ratio: Vec<f64>,
    /// uniform (stock loaders), ragged or masked (stock loaders, zeros) [default: uniform for scope expert, else
    /// ragged]
    #[arg(long)]
    pub export: Option<Export>,
    /// What becomes of layers that predict further tokens, in models that have them: keep, drop or prune
    #[arg(long)]
    pub mtp: Option<Mtp>,
    /// Directory for everything that is written [default: out/fisher_prune_qwen, replacing an earlier run there]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Memory to stay within, such as 2GiB; does not change results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan, cuda, or default: the fastest that is compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// Calibration sequences, at most
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(1))]
    pub samples: usize,
    /// Tokens of a calibration sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Take calibration rows in a random order of this seed instead of the first ones; also seeds the random control
    #[arg(long)]
    pub seed: Option<u64>,
    /// Tokens run together; part of the recipe, since sums are rounded per wave
    #[arg(long, value_name = "TOKENS", default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Rows per evaluation file, at most
    #[arg(long, value_name = "ROWS", default_value_t = 200, value_parser = cli::at_least(1))]
    pub eval_rows: usize,
    /// Tokens per window of a perplexity over rows of text
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = cli::at_least(2))]
    pub eval_length: usize,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Go on with what an interrupted run left in the output directory
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace the output of an earlier run; it is kept as OUT.replaced until the new one is complete
    #[arg(long)]
    pub force: bool,
    /// Also score by activation, magnitude, router score and at random [default without --model]
    #[arg(long)]
    pub controls: bool,
    /// Generate answers for rows that have one, and count exact matches [default without --model]
    #[arg(long)]
    pub generate: bool,
}

impl Arguments {
    /// The defaults that depend on other arguments: those of the bundled model, and the export of a scope.
    ///
    /// # Errors
    /// [`Error::Usage`] for arguments that do not go together.
    pub fn complete(mut self) -> Result<Self> {
        if self.model.is_none() {
            let data = PathBuf::from(TINY_MOE).join("data");
            self.calibration.get_or_insert_with(|| data.join("arithmetic_calibration.jsonl"));
            if self.eval.is_empty() {
                self.eval = ["arithmetic", "facts", "prose"].map(|name| data.join(format!("{name}_test.jsonl"))).into();
            }
            (self.controls, self.generate) = (true, true);
        }
        if self.calibration.is_none() {
            return Err(Error::Usage("--model needs --calibration FILE: rows of the domain to keep".into()));
        }
        let export = *self.export.get_or_insert(match self.scope {
            Scope::Expert => Export::Uniform,
            _ => Export::Ragged,
        });
        if export == Export::Uniform && self.scope != Scope::Expert {
            return Err(Error::Usage(format!(
                "--export uniform needs --scope expert: scope {} gives every expert a width of its own; export as ragged, \
                 or as masked for stock loaders",
                self.scope
            )));
        }
        if export == Export::FineGrained {
            return Err(Error::Usage(
                "--export fine_grained takes a calibration of its own: cargo run --release --example fine_grained"
                    .into(),
            ));
        }
        let mut seen = Vec::new();
        for ratio in std::mem::take(&mut self.ratio) {
            // clap checks what it parses, not what a program fills in
            cli::ratio(&ratio.to_string()).map_err(|reason| Error::Usage(format!("--ratio: {reason}")))?;
            if !seen.contains(&ratio) {
                seen.push(ratio);
            }
        }
        if seen.is_empty() {
            return Err(Error::Usage("--ratio: no ratio given".into()));
        }
        self.ratio = seen;
        Ok(self)
    }

    /// The model directory.
    pub fn model_dir(&self) -> PathBuf {
        self.model.clone().unwrap_or_else(|| TINY_MOE.into())
    }
}

impl Default for Arguments {
    /// Those of an empty command line.
    fn default() -> Self {
        clap::Parser::parse_from(["fisher_prune_qwen"])
    }
}

fn criterion(text: &str) -> Result<Criterion, String> {
    match text {
        "token" => Ok(Criterion::Token),
        "sequence" => Ok(Criterion::Sequence),
        "abs" => Ok(Criterion::Abs),
        _ => Err(format!("found `{text}`, expected token, sequence or abs")),
    }
}
