//! What a model can do: `cargo run --release --example evaluate [DIR]`.
//!
//! Measures the bundled model, or the one in a directory that can do the same, on three files of rows: the share of
//! answers that are exactly right, and the perplexity of text. What is measured follows from the rows.

use std::path::Path;

use moe::prelude::*;

/// The measurements, on `count` rows of each file at most.
pub fn measured(model: &str, count: usize) -> moe::Result<Vec<Measurement>> {
    let data = Path::new(moe_examples::TINY_MOE).join("data");
    let options = EvalOptions { rows: count, max_new_tokens: 32, ..EvalOptions::default() };
    let opened = Model::open(model, &device("default")?, None)?;
    let files = ["arithmetic", "facts", "prose"].map(|name| data.join(format!("{name}_test.jsonl")));
    files.iter().map(|file| measure(&opened, model, file, &options)).collect()
}

fn main() -> moe::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| moe_examples::TINY_MOE.into());
    for Measurement { key, value } in measured(&model, 200)? {
        println!("{key:20} {value:.4}");
    }
    Ok(())
}
