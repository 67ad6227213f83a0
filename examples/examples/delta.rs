//! What fine-tuning changed, as a small file: `cargo run --release --example delta -- --help`.

use std::process::ExitCode;

use moe_cli::{cli, delta};

fn main() -> ExitCode {
    cli::run(delta::run)
}
