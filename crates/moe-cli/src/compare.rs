//! Two or more models on the same rows.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Parser;
use moe::eval_file::{EvalFile, EvalOptions};
use moe::report::routing;
use moe_core::data::{Tokenizer, Wave, WaveOptions};
use moe_core::evaluate::divergence;
use moe_core::{Engine, EngineOptions, Model, TeacherLogits};
use serde::Serialize;

use crate::eval::{Measured, measure};
use crate::progress::{Progress, Unit};
use crate::table::Table;
use crate::{Error, Result, adapters, cli, format};

/// Compares models and saved plans on the same rows: answers, perplexity, divergence from the first of them, sizes
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Examples:\n  moe compare base pruned merged --data facts_test.jsonl\n  \
moe compare base --plan half.steps/steps/prune-…/plan.json --adapter out/adapter --data facts_test.jsonl --json\n\n\
Divergence: KL(first || other) of next-token distributions on the prompts, texts and choices of all files, in nats per token.")]
pub struct Arguments {
    /// Model directories; the others are compared with the first
    #[arg(required = true, value_name = "DIR")]
    pub models: Vec<PathBuf>,
    /// Also the first model under this plan of pruning or merging, which is not written; repeatable
    #[arg(long, value_name = "FILE")]
    pub plan: Vec<PathBuf>,
    /// Also the first model with what fine-tuning saved here; repeatable
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Rows to measure on, in a file named NAME_test.jsonl; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,
    /// How they are measured
    #[command(flatten)]
    pub measuring: crate::eval::MeasureArguments,
    /// Likeliest tokens per position that the divergence tells apart; the others count as one
    #[arg(long, default_value_t = 256, value_parser = cli::at_least(1))]
    pub top: usize,
    /// Tokens that go through the model together
    #[arg(long, default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// HTML file for the comparison: quality, divergence, sizes, widths of experts, and where tokens go
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// One of the models.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The directory, plan or adapter.
    pub name: String,
    /// Elements of all tensors, those of adapters left out.
    pub parameters: u64,
    /// Bytes of all tensors, as they would be written.
    pub bytes: u64,
    /// KL(first || this), in nats per token.
    pub divergence: f64,
    /// What it measures, one figure per file.
    pub measured: Vec<Measured>,
}

/// The models side by side, the one that the others are compared with first.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The models.
    pub models: Vec<Compared>,
    /// Tokens that the divergence is a mean over.
    pub tokens: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys =
            self.models.first().into_iter().flat_map(|model| &model.measured).map(|measured| measured.key.as_str());
        let header = ["model", "parameters", "bytes", "KL, nats"].into_iter().chain(keys);
        let mut table = Table::new(header, 1);
        for model in &self.models {
            let sizes =
                [format::count(model.parameters), format::size(model.bytes), format!("{:.4}", model.divergence)];
            let values = model.measured.iter().map(|measured| format!("{:.4}", measured.value));
            table.row([model.name.clone()].into_iter().chain(sizes).chain(values));
        }
        writeln!(f, "{}", table.to_text())?;
        writeln!(f, "KL: from the first model, mean over {} tokens", self.tokens)
    }
}

/// What is compared, by name.
enum Candidate<'a> {
    Model(&'a PathBuf),
    Plan(&'a PathBuf),
    Adapter(&'a PathBuf),
}

impl Candidate<'_> {
    fn name(&self) -> String {
        match self {
            Self::Model(path) => path.display().to_string(),
            Self::Plan(path) => format!("plan {}", path.display()),
            Self::Adapter(path) => format!("adapter {}", path.display()),
        }
    }

    fn open(&self, arguments: &Arguments) -> Result<Model> {
        let (plans, adapted): (&[PathBuf], &[PathBuf]) = match self {
            Self::Model(_) => (&[], &[]),
            Self::Plan(path) => (std::slice::from_ref(*path), &[]),
            Self::Adapter(path) => (&[], std::slice::from_ref(*path)),
        };
        let directory = if let Self::Model(path) = self { path } else { &arguments.models[0] };
        adapters::open(directory, plans, adapted, &arguments.device, arguments.max_memory)
    }
}

/// Checks everything, then measures one model after the other.
///
/// # Errors
/// A single model, models with other vocabularies, whatever is wrong with the files, and whatever stops a model.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<Report> {
    let candidates: Vec<Candidate<'_>> = (arguments.models.iter().map(Candidate::Model))
        .chain(arguments.plan.iter().map(Candidate::Plan))
        .chain(arguments.adapter.iter().map(Candidate::Adapter))
        .collect();
    if candidates.len() < 2 {
        return Err(Error::Usage("found one model, expected two or more: further DIRs, --plan or --adapter".into()));
    }
    let first = candidates[0].open(arguments)?;
    let tokenizer = Tokenizer::from_dir(&arguments.models[0])?;
    let options: EvalOptions = arguments.measuring.options();
    let files = EvalFile::load_all(&arguments.data, &options, Some(&tokenizer), first.config())?;
    let vocabulary = first.config().vocab_size;
    // Opened once before anything runs: a model that cannot be is an error of the first second.
    for candidate in &candidates[1..] {
        let found = candidate.open(arguments)?.config().vocab_size;
        if found != vocabulary {
            let reason = format!("a vocabulary of {found}, but the first model has {vocabulary}");
            return Err(Error::Invalid(format!("{}: {reason}", candidate.name())));
        }
    }
    let how = WaveOptions::Tokens(arguments.wave_tokens);
    let sequences: Vec<_> = files.iter().flat_map(EvalFile::sequences).filter(|sequence| sequence.len() > 1).collect();
    let waves: Vec<Wave> = moe_core::data::waves(&sequences, how);
    let total = candidates.len() * (files.len() + 1);
    let bar = progress.bar("comparing", total as u64, Unit::Count("files"));
    let top = arguments.top.min(vocabulary);
    let teacher = TeacherLogits::record(&Engine::new(&first, EngineOptions::default()), &waves, top)?;
    let (mut models, mut routings) = (Vec::with_capacity(candidates.len()), Vec::new());
    for (number, candidate) in candidates.iter().enumerate() {
        bar.label(candidate.name());
        let opened = if number == 0 { None } else { Some(candidate.open(arguments)?) };
        let model = opened.as_ref().unwrap_or(&first);
        let divergence = opened.as_ref().map(|model| divergence(model, &teacher, &waves)).transpose()?.unwrap_or(0.0);
        bar.step();
        let mut measured = Vec::with_capacity(files.len());
        for file in &files {
            measured.push(measure(file, model, &tokenizer, how)?);
            bar.step();
        }
        if arguments.report.is_some() {
            routings.push((candidate.name(), routing(model, &waves[..waves.len().min(1)])?));
        }
        let checkpoint = model.checkpoint();
        let (parameters, bytes) = (checkpoint.parameters(), checkpoint.bytes_on_disk());
        models.push(Compared { name: candidate.name(), parameters, bytes, divergence, measured });
    }
    let tokens = sequences.iter().map(|sequence| sequence.len() - 1).sum();
    if let Some(path) = &arguments.report {
        crate::pages::of_comparison(&models, &routings)?.write(path)?;
    }
    Ok(Report { models, tokens })
}
