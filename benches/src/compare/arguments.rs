//! The command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use crate::cli;

/// Where the study goes if nothing is said.
pub const DEFAULT_OUT: &str = "out/study";

/// Compares ways to prune the routed experts of a model at equal size.
///
/// Without --model: the whole study on the bundled model. Every scorer with every way to prune, calibrated on each of
/// three capabilities in turn, at four sizes and with three draws of the calibration rows; then repairs, stock exports,
/// allocators and knock-outs. With --merging: every way to merge instead, and what it is to be compared with. With
/// --model: a table for a model and data of your own.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "compare_methods")]
pub struct Arguments {
    /// Hugging Face model directory of your own [default: the study on the bundled tiny-moe]
    #[arg(long, value_name = "DIR", requires = "calibration")]
    pub model: Option<PathBuf>,
    /// Rows to score on: .jsonl with text, prompt and completion, messages or input_ids; or .txt
    #[arg(long, value_name = "FILE", requires = "model")]
    pub calibration: Option<PathBuf>,
    /// Rows to measure on, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE", requires = "model")]
    pub eval: Vec<PathBuf>,
    /// Scorer by its name in the study, by its own name, or as JSON; repeatable [default: fisher, activation, reap,
    /// random]
    #[arg(long, value_name = "SCORER", requires = "model")]
    pub scorer: Vec<String>,
    /// Way to prune by its name in the study, or a pruner as JSON; repeatable [default: global, layer, uniform,
    /// experts]
    #[arg(long, value_name = "PRUNER", requires = "model")]
    pub pruner: Vec<String>,
    /// Fraction of the expert units to drop; repeatable, or a list with commas [default: 0.5]
    #[arg(long, value_delimiter = ',', value_parser = cli::ratio, requires = "model")]
    pub ratio: Vec<f64>,
    /// Also generate answers for rows that have one, and count exact matches
    #[arg(long, requires = "model")]
    pub generate: bool,
    /// Calibration sequences, at most
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(1), requires = "model")]
    pub samples: usize,
    /// Tokens of a calibration sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2), requires = "model")]
    pub length: usize,
    /// Take calibration rows in a random order of this seed instead of the first ones
    #[arg(long, requires = "model")]
    pub seed: Option<u64>,
    /// Rows per evaluation file, at most
    #[arg(long, value_name = "ROWS", default_value_t = 200, value_parser = cli::at_least(1), requires = "model")]
    pub eval_rows: usize,
    /// Tokens per window of a perplexity over rows of text
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = cli::at_least(2), requires = "model")]
    pub eval_length: usize,
    /// Tokens run together; part of the recipe, since sums are rounded per wave
    #[arg(long, value_name = "TOKENS", default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Most likely tokens of the full model that are kept per position to compare with; the others count as one
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = cli::non_zero)]
    pub teacher_tokens: NonZeroUsize,
    /// Memory to stay within, such as 2GiB; does not change results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan, cuda, or default: the fastest that is compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// Directory for statistics, measurements, tables and the report
    #[arg(long, value_name = "DIR", default_value = DEFAULT_OUT)]
    pub out: PathBuf,
    /// Go on with what an interrupted run left in the output directory
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace the output of an earlier run; it is kept as OUT.replaced until the new one is complete
    #[arg(long)]
    pub force: bool,
    /// A small part of the study, in seconds: one capability, one seed, two sizes, few rows
    #[arg(long, conflicts_with = "model")]
    pub quick: bool,
    /// Draws of the calibration rows in the study, instead of three; fewer give no spread
    #[arg(long, value_name = "N", value_parser = cli::non_zero, conflicts_with_all = ["model", "quick"])]
    pub draws: Option<NonZeroUsize>,
    /// The study of ways to merge
    #[arg(long, conflicts_with = "model")]
    pub merging: bool,
    /// Configurations measured at a time; each mostly uses one core
    #[arg(long, value_name = "N", value_parser = cli::non_zero)]
    pub workers: Option<NonZeroUsize>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

impl Default for Arguments {
    /// Those of an empty command line.
    fn default() -> Self {
        clap::Parser::parse_from(["compare_methods"])
    }
}
