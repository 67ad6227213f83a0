//! Merging instead of dropping: `cargo run --release --example merge_experts`.
//!
//! HC-SMoE (arXiv 2410.08589) joins experts whose mean outputs are alike. A quarter of the experts go; their rows of
//! the router stay and lead to what they have become part of.

use std::path::Path;

use moe::merge::{Amount, Recipe as MergeRecipe};
use moe::prelude::*;

/// Parameters of the model before and after, and the perplexity of prose before and after.
pub fn merged(model: &str) -> moe::Result<([u64; 2], [f64; 2])> {
    let data = Path::new(model).join("data");
    let recipe = MergeRecipe::named("hc-smoe")?.with_amount(Amount::Ratio(0.25));
    let whole = Model::open(model, &device("default")?, None)?;
    let calibration = rows(&whole, data.join("prose_calibration.jsonl"), 64)?;
    let merged = merge(&whole, &calibration, &recipe, OutputForm::Grouped)?;
    let options = EvalOptions { rows: 50, ..EvalOptions::default() };
    let perplexity = |of: &Model| measure(of, model, data.join("prose_test.jsonl"), &options);
    let values = [perplexity(&whole)?.value, perplexity(&merged)?.value];
    Ok(([&whole, &merged].map(|model| model.checkpoint().parameters()), values))
}

fn main() -> moe::Result<()> {
    let ([before, after], [was, is]) = merged(moe_examples::TINY_MOE)?;
    println!("{before} parameters became {after}; perplexity of prose was {was:.1} and is {is:.1}");
    Ok(())
}
