//! Whole experts by REAP (arXiv 2510.13999): `cargo run --release --example reap_experts`.
//!
//! Drops a quarter of the experts of every layer, with their rows of the router, and tells what that cost. The outcome
//! has the shape of an ordinary checkpoint with fewer experts.

use std::path::Path;

use moe::prelude::*;

/// Exact answers to sums before and after, and the experts that each layer has left.
pub fn reap(model: &str) -> moe::Result<(Measurement, Measurement, Vec<usize>)> {
    let data = Path::new(model).join("data");
    let test = data.join("arithmetic_test.jsonl");
    let options = EvalOptions { rows: 50, max_new_tokens: 32, ..EvalOptions::default() };
    let whole = Model::open(model, &device("default")?, None)?;
    let scores = score(&whole, &rows(&whole, data.join("arithmetic_calibration.jsonl"), 64)?, &Reap::default())?;
    // The pruner leaves no layer fewer experts than a token is routed to.
    let pruner = ExpertPruner::new().for_routing(&whole.config().routing);
    let pruned = prune(&whole, &scores, &pruner, Budget::Ratio(0.25), PruneForm::Uniform)?;
    let before = measure(&whole, model, &test, &options)?;
    let after = measure(&pruned, model, &test, &options)?;
    let left = pruned.checkpoint().shape().layers.iter().map(|layer| layer.num_experts()).collect();
    Ok((before, after, left))
}

fn main() -> moe::Result<()> {
    let (before, after, left) = reap(moe_examples::TINY_MOE)?;
    println!("experts left: {left:?}");
    println!("{}: {:.3} before, {:.3} after", before.key, before.value, after.value);
    Ok(())
}
