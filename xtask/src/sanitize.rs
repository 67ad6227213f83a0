//! Tests of the crates with unsafe code under AddressSanitizer, on the stable toolchain.

use crate::instrument::ADDRESSES;
use crate::{Result, root};

/// Crates with unsafe code: maps of files, the kernels, the sums of outer products.
const CRATES: [&str; 3] = ["moe-checkpoint", "moe-core", "moe-importance"];

/// What is run.
#[derive(clap::Args)]
pub struct Options {
    /// Crates whose tests run
    #[arg(default_values = CRATES, value_parser = CRATES)]
    crates: Vec<String>,
    /// The unit tests alone, which all kernels have
    #[arg(long)]
    lib: bool,
    /// Tests whose names hold this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

/// Builds the tests and runs them to their end.
pub fn run(options: &Options) -> Result<()> {
    let mut command = ADDRESSES.cargo(&root())?;
    command.args(["test", "--release", "--no-fail-fast", "--lib"]);
    if !options.lib {
        command.arg("--tests");
    }
    for name in &options.crates {
        command.args(["--package", name]);
    }
    command.args(&options.filter);
    // What lives as long as the process is no leak, and the programs that tests start are not instrumented.
    command.env("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=1");
    match command.status()?.success() {
        true => Ok(()),
        false => Err("tests fail under AddressSanitizer; what it found is printed above".into()),
    }
}
