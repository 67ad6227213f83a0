//! Scores the experts or units of a model ten ways from one pass: `cargo run --release --example score -- --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_cli::{cli, score};

fn main() -> ExitCode {
    cli::run(|arguments: score::Arguments| {
        cli::allocator(arguments.max_memory);
        let json = arguments.json;
        let report = score::run(&arguments, Progress::stderr())?;
        Ok(if json { format!("{}\n", serde_json::to_string(&report).unwrap_or_default()) } else { report.to_string() })
    })
}
