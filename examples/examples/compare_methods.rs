//! Compares ways to prune at equal size: `cargo run --release --example compare_methods`, or with `-- --help`.

use std::process::ExitCode;

use moe_examples::progress::Progress;
use moe_examples::{cli, compare};

fn main() -> ExitCode {
    cli::run(|arguments: compare::Arguments| {
        cli::allocator(arguments.max_memory);
        compare::run(arguments, Progress::stderr())
    })
}
