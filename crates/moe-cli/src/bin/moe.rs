//! The program `moe`.

use std::process::ExitCode;

fn main() -> ExitCode {
    moe_cli::program::main()
}
