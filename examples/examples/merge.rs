//! Merges the experts of a model by a published recipe: `cargo run --release --example merge -- --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, merge};

fn main() -> ExitCode {
    cli::run(|arguments: merge::Arguments| {
        cli::allocator(arguments.max_memory);
        let json = arguments.json;
        let report = merge::run(&arguments, Progress::stderr())?;
        Ok(if json { format!("{}\n", serde_json::to_string(&report).unwrap_or_default()) } else { report.to_string() })
    })
}
