//! A whole chain from one description: `cargo run --release --example run_recipe`.
//!
//! The same JSON in a file is what `moe run FILE` takes. Every step's outcome is kept, so that a run that was killed
//! goes on, and steps that a change of the recipe does not touch are not done again. The directory has a `report.html`
//! in the end.

use std::path::Path;

use moe::prelude::*;
use moe::run::RunReport;
use serde_json::json;

/// Carries out the chain.
pub fn chain(model: &str, out: &Path) -> Result<RunReport, Box<dyn std::error::Error>> {
    let data = Path::new(model).join("data");
    let recipe: Recipe = serde_json::from_value(json!({
        "model": model,
        "data": {
            "calibration": [data.join("facts_calibration.jsonl")],
            "eval": [data.join("facts_test.jsonl")],
            "samples": 64,
        },
        "out": out,
        "steps": [
            {"evaluate": {"options": {"rows": 50, "max_new_tokens": 16}}},
            {"score": {"scorers": ["fisher", "reap"]}},
            {"prune": {"scores": "fisher", "budget": {"ratio": 0.4}, "form": "ragged"}},
            {"repair": {"type": "refit"}},
            {"evaluate": {"options": {"rows": 50, "max_new_tokens": 16}}},
            {"write": {}},
        ],
    }))?;
    Ok(run(&recipe, RunOptions { resume: true, ..RunOptions::new(moe::progress::Progress::hidden()) })?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::temp_dir().join("moe-examples-recipe");
    println!("{}", chain(moe_examples::TINY_MOE, &out)?);
    println!("report: {}", out.join("report.html").display());
    Ok(())
}
