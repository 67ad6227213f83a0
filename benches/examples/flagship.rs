//! Stock exports against published methods, on any model: `cargo run --release --example flagship -- --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_benches::flagship;
use moe_cli::cli;

fn main() -> ExitCode {
    cli::run(|arguments: flagship::Arguments| {
        cli::allocator(arguments.max_memory);
        flagship::run(&arguments, Progress::stderr())
    })
}
