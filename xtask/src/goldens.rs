//! What stock transformers computes for every export of every fixture: the numbers of the test `stock_exports`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Result, at, root};

/// Where the numbers go.
const GOLDEN: &str = "crates/moe-checkpoint/tests/fixtures/stock_exports.safetensors";
/// Where what PEFT makes of adapters goes.
const ADAPTERS: &str = "crates/moe-checkpoint/tests/fixtures/stock_adapters.json";

/// Exports the fixtures, runs them in transformers and writes the numbers. `python` has torch, transformers,
/// peft and safetensors.
pub fn run(python: &Path) -> Result<()> {
    let out = root().join("target/goldens");
    if out.exists() {
        fs::remove_dir_all(&out).map_err(at(&out))?;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut export = Command::new(cargo);
    // not `--package`: another set of features would build Burn anew
    export.args(["run", "--release", "--example", "exports", "--", "--out"]);
    export.arg(&out);
    let mut load = Command::new(python);
    load.arg("xtask/scripts/roundtrip.py").arg(&out).args(["--golden", GOLDEN, "--adapters", ADAPTERS]);
    for command in [&mut export, &mut load] {
        let status = command.current_dir(root()).status().map_err(at(Path::new(command.get_program())))?;
        if !status.success() {
            return Err(format!("{} failed", command.get_program().display()).into());
        }
    }
    println!("now `cargo xtask fixtures --write`, and `cargo test --release --workspace --test stock_exports`");
    Ok(())
}
