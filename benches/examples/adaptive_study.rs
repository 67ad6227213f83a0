//! Quality against experts per token, layers and time: `cargo run --release --example adaptive_study -- --help`.

use std::process::ExitCode;

use moe_benches::adaptive_study;
use moe_cli::cli;

fn main() -> ExitCode {
    cli::run(|arguments: adaptive_study::Arguments| {
        cli::allocator(None);
        adaptive_study::run(&arguments)
    })
}
