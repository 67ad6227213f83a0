//! Fine-tunes a model by several methods side by side: `cargo run --release --example finetune_qwen -- --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, finetune};

fn main() -> ExitCode {
    cli::run(|arguments: finetune::Arguments| {
        cli::allocator(arguments.max_memory);
        finetune::print(arguments, Progress::stderr())
    })
}
