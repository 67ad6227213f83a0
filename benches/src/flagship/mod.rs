//! One claim on several models: what is left of a model in a form that stock loaders read, chosen by measuring, against
//! the published ways to prune and to merge at equal size, before and after the same recovery.

mod domain;
mod entries;
mod measured;
mod tables;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use domain::Loaded;
use moe::out_dir::{Existing, OutDir};
use moe_checkpoint::{Checkpoint, write_atomic};
use moe_core::Model;
use moe_core::data::{Tokenizer, WaveOptions};
use serde_json::{Value, json};

pub use domain::Domain;
pub use entries::{ENTRIES, Entry};
pub use measured::Measured;

use crate::compare::catalog;
use crate::progress::Progress;
use crate::{Error, Result, cli};

/// Compares stock exports that are chosen by measuring with published ways to prune and to merge, on any model
#[derive(Clone, Debug, Parser)]
#[command(name = "flagship")]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// What the model is called in the names of tables
    #[arg(long)]
    pub name: String,
    /// Rows of a domain to calibrate on, and files NAME_test.jsonl to measure on, the first of which decides how rows
    /// are read: text in windows, or completions, which alone count in losses; repeatable
    #[arg(long = "domain", value_name = "NAME=ROWS,TEST[,TEST]", required = true)]
    pub domains: Vec<Domain>,
    /// Methods, a list with commas [default: all, or none with --knock-out]
    #[arg(long = "method", value_delimiter = ',', value_parser = ENTRIES.map(|entry| entry.name))]
    pub methods: Vec<String>,
    /// Fractions of the routed experts that go, a list with commas; the first ones are measured first
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.75, 0.375, 0.625], value_parser = cli::ratio)]
    pub ratio: Vec<f64>,
    /// Draws of the calibration rows
    #[arg(long, default_value_t = 3, value_parser = cli::at_least(1))]
    pub draws: usize,
    /// What follows pruning: a repair by its name, or as JSON
    #[arg(long, default_value = "recovery")]
    pub recovery: String,
    /// Fractions at which that is measured
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.75], value_parser = cli::ratio)]
    pub recovered: Vec<f64>,
    /// Draws in which that is measured [default: all]
    #[arg(long)]
    pub recovered_draws: Option<usize>,
    /// Fractions at which scorers are compared
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.75], value_parser = cli::ratio)]
    pub scored: Vec<f64>,
    /// Draws in which scorers are compared [default: all]
    #[arg(long)]
    pub scored_draws: Option<usize>,
    /// Numbers of units that every scorer takes out, the best ones, a list with commas
    #[arg(long, value_delimiter = ',')]
    pub knock_out: Vec<u32>,
    /// Rows of a draw that are no text
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(3))]
    pub samples: usize,
    /// Windows of a draw of text
    #[arg(long, default_value_t = 64, value_parser = cli::at_least(3))]
    pub windows: usize,
    /// Tokens of a window or row, at most
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Tokens that are predicted of a test file, about
    #[arg(long, default_value_t = 3000, value_parser = cli::at_least(2))]
    pub test_tokens: usize,
    /// Questions that are answered of a test file, at most
    #[arg(long, default_value_t = 100, value_parser = cli::at_least(1))]
    pub questions: usize,
    /// Ask only those questions with choices that the full model answers
    #[arg(long)]
    pub answered_only: bool,
    /// Tokens run together
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Likeliest tokens of the full model per position that divergences are of
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = cli::at_least(1))]
    pub teacher_tokens: usize,
    /// Configurations at a time
    #[arg(long, default_value_t = 1, value_parser = cli::at_least(1))]
    pub workers: usize,
    /// Memory to stay within, such as 2GiB; does not change results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// Directory for statistics, measurements and tables
    #[arg(long, value_name = "DIR", default_value = "out/flagship")]
    pub out: PathBuf,
    /// Go on with what an earlier run left, with more draws, fractions or methods if asked for
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace the output of an earlier run
    #[arg(long)]
    pub force: bool,
}

impl Arguments {
    /// The methods, in the order of the tables.
    fn entries(&self) -> Vec<&'static Entry> {
        let all = self.methods.is_empty() && self.knock_out.is_empty();
        ENTRIES.iter().filter(|entry| all || self.methods.iter().any(|name| name == entry.name)).collect()
    }

    fn wave_options(&self) -> WaveOptions {
        WaveOptions::Tokens(self.wave_tokens)
    }

    /// What all measurements in a directory have in common.
    fn recipe(&self, checkpoint: &Checkpoint, domains: &[Loaded]) -> Value {
        let mut hasher = blake3::Hasher::new();
        domains.iter().for_each(|domain| domain.hash(&mut hasher));
        json!({
            "program": "flagship",
            "crate_version": env!("CARGO_PKG_VERSION"),
            "model_fingerprint": checkpoint.fingerprint(),
            "calibration": { "hash": hasher.finalize().to_hex().to_string(), "wave_tokens": self.wave_tokens },
            "scorers": entries::SCORERS,
        })
    }
}

/// Measures what is missing, and gives the tables, which are in `tables.md` of the directory, too.
///
/// # Errors
/// What is wrong with the arguments and the files that they name, before anything is measured; whatever stops a
/// measurement, after which `--resume` goes on.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<String> {
    let existing = match (arguments.resume, arguments.force) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Replace,
        _ => Existing::Refuse,
    };
    let out = OutDir::check(&arguments.out, existing)?;
    catalog::repair(&arguments.recovery)?;
    let device = moe_core::device::device("default")?;
    let checkpoint = Arc::new(Checkpoint::open(&arguments.model)?);
    if checkpoint.shape().units() == 0 {
        return Err(Error::Invalid(format!("{}: no routed experts to prune", arguments.model.display())));
    }
    let tokenizer = Tokenizer::from_dir(&arguments.model)?;
    let mut domains: Vec<Loaded> = Vec::new();
    for domain in &arguments.domains {
        if domains.iter().any(|other| other.domain.name == domain.name) {
            return Err(Error::Usage(format!("--domain {}: named twice", domain.name)));
        }
        domains.push(Loaded::new(domain, arguments, &tokenizer, &checkpoint)?);
    }
    let recipe = arguments.recipe(&checkpoint, &domains);
    if existing == Existing::Resume {
        out.check_resumable(&recipe)?;
    }
    out.open(existing, &recipe)?;
    let tables = out.root().join("tables.md");
    let mut all: Vec<Measured> = Vec::new();
    for domain in domains {
        let model = Model::new(checkpoint.clone(), &device, arguments.max_memory)?;
        let tokenizer = Tokenizer::from_dir(&arguments.model)?;
        let done = measured::measure(arguments, domain, model, tokenizer, out.root(), progress)?;
        all.push(done);
        write_atomic(&tables, tables::markdown(arguments, &checkpoint, &all)?.as_bytes())?;
    }
    let text = tables::markdown(arguments, &checkpoint, &all)?;
    out.finish(&json!({ "recipe": recipe, "domains": all.iter().map(Measured::to_json).collect::<Vec<_>>() }))?;
    Ok(text)
}
