//! Fine-tunes a model by several methods side by side: `cargo run --release --example finetune_qwen -- --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, finetune};

fn main() -> ExitCode {
    cli::run(|arguments: finetune::Arguments| {
        cli::allocator(arguments.max_memory);
        let json = arguments.json;
        let finished = finetune::run(arguments, Progress::stderr())?;
        Ok(if json { format!("{}\n", serde_json::json!(finished.results)) } else { finished.text })
    })
}
