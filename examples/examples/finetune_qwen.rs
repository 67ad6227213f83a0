//! Fine-tunes a model by several methods side by side: `cargo run --release --example finetune_qwen`, or with
//! `-- --help`.
//!
//! Without arguments it teaches the bundled model division, which it has never seen, and measures what each method
//! makes of that and of what the model could do before. `--model`, `--data` and `--method` take what you have;
//! `moe tune` is the same job.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, finetune};

fn main() -> ExitCode {
    cli::run(|arguments: finetune::Arguments| {
        // Memory that is freed stays with the process, which is faster, unless there is a limit to stay within.
        cli::allocator(arguments.max_memory);
        // A table, JSON for `--json`, or the names of all methods for `--method list`.
        finetune::print(arguments, Progress::stderr())
    })
}
