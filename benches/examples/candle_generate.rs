//! Greedy generation by candle-transformers, or by the engine here, on the same prompts: new tokens per second, prompts
//! included, and peak memory, as one JSON line. Threads are RAYON_NUM_THREADS for both.
//!
//! ```text
//! cargo run --release -p moe-benches --features candle --example candle_generate -- --model DIR --data rows.jsonl
//! ```

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use moe::Error;
use moe_benches::candle::Candle;
use moe_cli::cli;
use moe_core::Model;
use moe_core::data::Tokenizer;
use moe_core::device::device;
use moe_core::generate::{GenerateOptions, generate};
use moe_core::memory::process_memory;
use serde_json::{Value, json};

/// What generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// candle-transformers, in f32.
    Candle,
    /// The engine of these crates.
    Moe,
}

/// Continues prompts greedily and says how long it took
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// Model directory, with its tokenizer
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Rows with a prompt
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Prompts, at most
    #[arg(long, default_value_t = 60)]
    prompts: usize,
    /// Texts at a time. candle has no mask for texts of other lengths: of several, prompts are cut to the shortest
    #[arg(long, default_value_t = 1, value_parser = cli::at_least(1))]
    batch: usize,
    /// New tokens of each, whatever they are
    #[arg(long, default_value_t = 28, value_parser = cli::at_least(1))]
    new_tokens: usize,
    /// What generates
    #[arg(long, value_enum, default_value = "candle")]
    by: By,
}

fn main() -> ExitCode {
    cli::run(|arguments: Arguments| Ok(format!("{}\n", run(&arguments)?)))
}

fn run(arguments: &Arguments) -> Result<Value, Error> {
    let tokenizer = Tokenizer::from_dir(&arguments.model)?;
    let text = fs::read_to_string(&arguments.data).map_err(Error::io(&arguments.data))?;
    let wrong = |what: String| Error::Invalid(format!("{}: {what}", arguments.data.display()));
    let mut prompts = Vec::new();
    for line in text.lines().take(arguments.prompts) {
        let row: Value = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        let prompt = row["prompt"].as_str().ok_or_else(|| wrong("a row without a prompt".into()))?;
        prompts.push(tokenizer.encode(prompt)?);
    }
    let shortest = prompts.iter().map(Vec::len).min().ok_or_else(|| wrong("no rows".into()))?;
    if arguments.batch > 1 {
        prompts.iter_mut().for_each(|prompt| prompt.truncate(shortest));
    }
    let new_tokens = arguments.new_tokens;
    let mut made = Vec::new();
    let started;
    match arguments.by {
        By::Candle => {
            let mut model = Candle::open(&arguments.model)?;
            started = Instant::now();
            for batch in prompts.chunks(arguments.batch) {
                let batch: Vec<&[u32]> = batch.iter().map(Vec::as_slice).collect();
                made.extend(model.generate(&batch, new_tokens)?);
            }
        }
        By::Moe => {
            let model = Model::open(&arguments.model, &device("flex")?, None)?;
            let options =
                GenerateOptions { max_new_tokens: new_tokens, stop: Vec::new(), ..GenerateOptions::default() };
            started = Instant::now();
            for batch in prompts.chunks(arguments.batch) {
                made.extend(generate(&model, batch, &options, |_| false)?);
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let count: usize = made.iter().map(Vec::len).sum();
    let mut hasher = blake3::Hasher::new();
    made.iter().flatten().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    Ok(json!({
        "by": format!("{:?}", arguments.by).to_lowercase(),
        "prompts": prompts.len(),
        "prompt_tokens": prompts.iter().map(Vec::len).sum::<usize>(),
        "batch": arguments.batch,
        "new_tokens": new_tokens,
        "seconds": (seconds * 100.0).round() / 100.0,
        "tokens_per_second": (10.0 * count as f64 / seconds).round() / 10.0,
        "peak_bytes": process_memory().map(|memory| memory.peak),
        // Of the tokens that were made, to see whether two runs made the same.
        "blake3": hasher.finalize().to_hex()[..16],
    }))
}
