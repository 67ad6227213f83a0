//! Compares ways to prune at equal size: `cargo run --release --example compare_methods`, or with `-- --help`.

use std::process::ExitCode;

use moe::progress::Progress;
use moe_benches::compare;
use moe_cli::cli;

fn main() -> ExitCode {
    cli::run(|arguments: compare::Arguments| {
        cli::allocator(arguments.max_memory);
        compare::run(arguments, Progress::stderr())
    })
}
