//! Scores, prunes and measures a Mixture-of-Experts model: `cargo run --release --example fisher_prune_qwen`, or with
//! `-- --help`.
//!
//! Every unit of the routed experts is scored by Fisher information, the lowest go, what is left is written, opened
//! again and measured. Without arguments that is done to the bundled model, beside four other ways to score; `--model`
//! takes a model of any family that these crates run.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, fisher_prune};

fn main() -> ExitCode {
    cli::run(|arguments: fisher_prune::Arguments| {
        // Memory that is freed stays with the process, which is faster, unless there is a limit to stay within.
        cli::allocator(arguments.max_memory);
        let json = arguments.json;
        let finished = fisher_prune::run(arguments, Progress::stderr())?;
        // The table is for people; programs read the same figures as one object.
        Ok(if json { format!("{}\n", finished.results.to_json()) } else { finished.text })
    })
}
