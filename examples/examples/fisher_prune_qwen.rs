//! Scores, prunes and measures a Qwen MoE model: `cargo run --release --example fisher_prune_qwen`, or with `--
//! --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, fisher_prune};

fn main() -> ExitCode {
    cli::run(|arguments: fisher_prune::Arguments| {
        cli::allocator(arguments.max_memory);
        let json = arguments.json;
        let finished = fisher_prune::run(arguments, Progress::stderr())?;
        Ok(if json { format!("{}\n", finished.results.to_json()) } else { finished.text })
    })
}
