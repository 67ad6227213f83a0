//! Text from a model: `cargo run --release --example generate -- "The capital of France is"`.
//!
//! Continues a prompt with the likeliest tokens, until the model ends its text or a line ends.

use moe::prelude::*;

/// The continuation.
pub fn continued(model: &str, prompt: &str) -> moe::Result<String> {
    let tokenizer = Tokenizer::from_dir(model)?;
    let model = Model::open(model, &device("default")?, None)?;
    let stop = tokenizer.eos_ids().iter().chain(&model.config().eos_token_ids).copied().collect();
    let options = GenerateOptions { max_new_tokens: 40, stop, ..GenerateOptions::default() };
    let line_ends = |tokens: &[u32]| tokenizer.decode(tokens).is_ok_and(|text| text.ends_with('\n'));
    let completion = generate(&model, &[tokenizer.encode(prompt)?], &options, line_ends)?.concat();
    Ok(tokenizer.decode(&completion)?)
}

fn main() -> moe::Result<()> {
    let sum = "Question: Vic finds 36 plums, then 20 more, and loses 7. How many plums remain?\nAnswer:";
    let prompt = std::env::args().nth(1).unwrap_or_else(|| sum.into());
    println!("{prompt}{}", continued(moe_examples::TINY_MOE, &prompt)?.trim_end());
    Ok(())
}
