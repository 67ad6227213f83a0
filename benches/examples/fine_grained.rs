//! Prunes experts to equal pieces that stock loaders read: `cargo run --release --example fine_grained -- --help`.

use std::process::ExitCode;

use moe_benches::fine_grained;
use moe_cli::cli;

fn main() -> ExitCode {
    cli::run(|arguments: fine_grained::Arguments| {
        cli::allocator(None);
        let json = arguments.json;
        let report = fine_grained::run(&arguments)?;
        Ok(if json { format!("{}\n", serde_json::to_string(&report).unwrap_or_default()) } else { report.to_string() })
    })
}
