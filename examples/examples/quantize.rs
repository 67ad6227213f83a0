//! Few bits per weight: `cargo run --release --example quantize`.
//!
//! Rounds the routed experts of the bundled model to integers of 8 bits in groups of 32, and measures what that cost.
//! Nothing is computed before the model is run or written; engines read what is written.

use std::path::Path;

use moe::checkpoint::{QuantizeOptions, Quantized, WeightFormat};
use moe::format::size;
use moe::prelude::*;

/// Bytes of the model and its perplexity on prose, before and after.
pub fn quantized(model: &str, out: &Path) -> moe::Result<([u64; 2], [f64; 2])> {
    let whole = Model::open(model, &device("default")?, None)?;
    let format = WeightFormat::Int { bits: 8, group_size: Some(32), symmetric: true };
    let rounded = Quantized::on(whole.checkpoint(), &QuantizeOptions::new(format))?;
    write(rounded.model(), out, &WriteOptions { existing: Existing::Force, ..Default::default() })?;

    let small = Model::new(rounded.model().clone(), whole.device(), None)?;
    let options = EvalOptions { rows: 50, ..EvalOptions::default() };
    let test = Path::new(model).join("data/prose_test.jsonl");
    let [was, is] = [measure(&whole, model, &test, &options)?, measure(&small, model, &test, &options)?];
    Ok(([&whole, &small].map(|model| model.checkpoint().bytes_on_disk()), [was.value, is.value]))
}

fn main() -> moe::Result<()> {
    let out = std::env::temp_dir().join("moe-examples-int8");
    let ([before, after], [was, is]) = quantized(moe_examples::TINY_MOE, &out)?;
    println!("{} became {}; perplexity of prose was {was:.2} and is {is:.2}", size(before), size(after));
    Ok(())
}
