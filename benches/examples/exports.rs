//! Exports checkpoints in every way that stock loaders read: `cargo run --release --example exports -- --help`.

use std::process::ExitCode;

use moe_benches::exports;
use moe_cli::cli;

fn main() -> ExitCode {
    cli::run(|arguments: exports::Arguments| {
        let report = exports::run(&arguments)?;
        let json = || format!("{}\n", serde_json::to_string(&report).unwrap_or_default());
        Ok(if arguments.json { json() } else { report.to_string() })
    })
}
