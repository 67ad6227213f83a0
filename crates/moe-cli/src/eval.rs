//! What a model can do: perplexity, exact answers and multiple choice on rows of one's own.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use moe::eval_file::{EvalFile, EvalOptions};
use moe_core::Model;
use moe_core::data::{Tokenizer, WaveOptions};
use moe_core::memory::process_memory;
use serde::Serialize;

use crate::cli;
use crate::progress::{Progress, Unit};
use crate::table::Table;
use crate::{Error, Result, format};

/// Measures a model on rows: perplexity of text, exact match of generated answers, multiple choice by likelihood
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Example: moe eval --model out/pruned --data arithmetic_test.jsonl --data prose_test.jsonl\n\n\
Rows: {\"text\"} for perplexity; {\"prompt\", \"answer\"} for exact match; {\"prompt\", \"choices\", \"answer\"} for multiple choice, \
where answer is the right choice or its number.")]
pub struct Arguments {
    /// What is measured
    #[command(flatten)]
    pub model: crate::adapters::ModelArguments,
    /// Rows to measure on, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,
    /// How it is measured
    #[command(flatten)]
    pub measuring: MeasureArguments,
    /// Tokens that go through the model together
    #[arg(long, default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// HTML file for the measurements, with sizes and widths of the experts
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// How models are measured on rows.
#[derive(Clone, Debug, clap::Args)]
pub struct MeasureArguments {
    /// Rows per file, at most
    #[arg(long, default_value_t = 200, value_parser = cli::at_least(1))]
    pub rows: usize,
    /// Tokens per window of a perplexity over rows of text
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(2))]
    pub length: usize,
    /// New tokens per answer, at most
    #[arg(long, default_value_t = 256, value_parser = cli::at_least(1))]
    pub max_new_tokens: usize,
    /// Text that ends an answer; repeatable [default: the end of the line]
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Put prompts into the model's chat template, as the user's turn
    #[arg(long)]
    pub chat: bool,
    /// Perplexity of the answers given their prompts, instead of generating them
    #[arg(long)]
    pub perplexity: bool,
}

impl MeasureArguments {
    /// As evaluation files are read.
    pub fn options(&self) -> EvalOptions {
        EvalOptions {
            rows: self.rows,
            length: self.length,
            generate: !self.perplexity,
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            chat: self.chat,
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// NAME_exact, NAME_ppl or NAME_choice.
    pub key: String,
    /// What it is, for people.
    pub what: String,
    /// The figure: a share, or a perplexity.
    pub value: f64,
    /// Tokens that were predicted or generated.
    pub tokens: usize,
    /// Seconds it took.
    pub seconds: f64,
}

/// What was measured of a model.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model directory.
    pub model: PathBuf,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The measurements, one per file.
    pub measured: Vec<Measured>,
    /// Largest resident size of the process, in MiB.
    pub peak_rss_mib: Option<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} parameters, {}",
            self.model.display(),
            format::count(self.parameters),
            format::size(self.bytes)
        )?;
        let mut table = Table::new(["measured", "of", "value", "tokens/s"], 2);
        for measured in &self.measured {
            table.row([
                measured.key.clone(),
                measured.what.clone(),
                format!("{:.4}", measured.value),
                format!("{:.0}", measured.tokens as f64 / measured.seconds.max(1e-9)),
            ]);
        }
        writeln!(f, "{}", table.to_text())
    }
}

/// Checks everything, then measures.
///
/// # Errors
/// Whatever is wrong with the arguments or the files they name, and whatever stops the model.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<Report> {
    let model = arguments.model.open()?;
    let directory = &arguments.model.model;
    let tokenizer = match directory.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(directory)?),
        false => None,
    };
    let options = arguments.measuring.options();
    let files = EvalFile::load_all(&arguments.data, &options, tokenizer.as_ref(), model.config())?;
    let waves = WaveOptions::Tokens(arguments.wave_tokens);
    for file in &files {
        file.check_memory(&model, waves)?;
    }
    let bar = progress.bar("measuring", files.len() as u64, Unit::Count("files"));
    let mut measured = Vec::with_capacity(files.len());
    for file in &files {
        let Some(tokenizer) = &tokenizer else {
            return Err(Error::Invalid(format!("{}: has no tokenizer.json", directory.display())));
        };
        bar.label(file.name.clone());
        measured.push(measure(file, &model, tokenizer, waves)?);
        bar.step();
    }
    if let Some(path) = &arguments.report {
        crate::pages::of_measurements(&directory.display().to_string(), &model, &measured)?.write(path)?;
    }
    Ok(Report {
        model: directory.clone(),
        parameters: model.checkpoint().parameters(),
        bytes: model.checkpoint().bytes_on_disk(),
        measured,
        peak_rss_mib: process_memory().map(|memory| memory.peak as f64 / (1 << 20) as f64),
    })
}

/// What a model measures on one file, and how long it took.
///
/// # Errors
/// Whatever stops the model.
pub fn measure(file: &EvalFile, model: &Model, tokenizer: &Tokenizer, waves: WaveOptions) -> Result<Measured> {
    let start = Instant::now();
    let (value, tokens) = file.measure(model, tokenizer, waves)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Measured { key: file.key(), what: file.description(), value, tokens, seconds })
}
