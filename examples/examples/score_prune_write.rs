//! Score, prune, write: `cargo run --release --example score_prune_write`.
//!
//! Scores every unit of the bundled model by its gradients on sums, drops half of them, and writes the smaller
//! checkpoint. Exchange the two paths for a model directory and a file of rows of your own.

use std::path::Path;

use moe::prelude::*;

/// Writes the smaller checkpoint; its parameters and those of the whole.
pub fn half(model: &str, data: &Path, out: &Path) -> moe::Result<(u64, u64)> {
    let model = Model::open(model, &device("default")?, None)?;
    let scores = score(&model, &rows(&model, data, 128)?, &Fisher::default())?;
    // Units of the whole model compete; `Scope::Expert` with `PruneForm::Uniform` is what stock runtimes load.
    let half = prune(&model, &scores, &UnitPruner::new(Scope::Global), Budget::Ratio(0.5), PruneForm::Ragged)?;
    write(half.checkpoint(), out, &WriteOptions { existing: Existing::Force, ..Default::default() })?;
    Ok((half.checkpoint().parameters(), model.checkpoint().parameters()))
}

fn main() -> moe::Result<()> {
    let out = std::env::temp_dir().join("moe-examples-half");
    let data = Path::new(moe_examples::TINY_MOE).join("data/arithmetic_calibration.jsonl");
    let (kept, whole) = half(moe_examples::TINY_MOE, &data, &out)?;
    println!("{kept} of {whole} parameters are in {}", out.display());
    Ok(())
}
