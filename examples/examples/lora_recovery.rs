//! Recovery by LoRA: `cargo run --release --example lora_recovery`.
//!
//! Drops half of the units of every expert, which costs a good deal, and trains low-rank additions beside attention and
//! beside every expert that is left. What is saved is a checkpoint with the additions in its weights, and an adapter
//! that PEFT loads.

use std::path::Path;

use moe::peft::Recipe as TuneRecipe;
use moe::prelude::*;

/// Exact answers to sums of the whole model, of half of it, and of the half after `steps` steps of training.
pub fn recovered(model: &str, steps: usize, out: &Path) -> Result<[f64; 3], Box<dyn std::error::Error>> {
    let data = Path::new(model).join("data");
    let (calibration, test) = (data.join("arithmetic_calibration.jsonl"), data.join("arithmetic_test.jsonl"));
    let whole = Model::open(model, &device("default")?, None)?;
    let scores = score(&whole, &rows(&whole, &calibration, 64)?, &Fisher::default())?;
    let half = prune(&whole, &scores, &UnitPruner::new(Scope::Expert), Budget::Ratio(0.5), PruneForm::Uniform)?;

    let mut recipe = TuneRecipe::named("lora-experts")?;
    // The published rate is for models that are a thousand times larger.
    (recipe.train.max_steps, recipe.train.schedule.peak) = (std::num::NonZeroUsize::new(steps).map(Into::into), 3e-3);
    let trained = tune(&half, &training_rows(&whole, &calibration, 128)?, &recipe, 512, out)?;
    let trained = Model::open(trained, half.device(), None)?;

    let options = EvalOptions { rows: 50, max_new_tokens: 32, ..EvalOptions::default() };
    let exact = |of: &Model| measure(of, model, &test, &options).map(|found| found.value);
    Ok([exact(&whole)?, exact(&half)?, exact(&trained)?])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::temp_dir().join(format!("moe-examples-lora-{}", std::process::id()));
    let [whole, half, trained] = recovered(moe_examples::TINY_MOE, 100, &out)?;
    println!("exact sums: {whole:.3} whole, {half:.3} by half of the units, {trained:.3} after training");
    println!("the model and the adapter are in {}", out.display());
    Ok(())
}
