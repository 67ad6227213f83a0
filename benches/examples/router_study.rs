//! Compares ways to train that concern routing: `cargo run --release --example router_study -- --help`.

use std::process::ExitCode;

use moe_benches::router_study;
use moe_cli::cli;

fn main() -> ExitCode {
    cli::run(|arguments: router_study::Arguments| {
        cli::allocator(None);
        router_study::run(&arguments)
    })
}
