//! Writes logits, loss, layer inputs, router logits and gradients of a model on given tokens:
//! `cargo run --release --example trace -- --help`.

use std::process::ExitCode;

use moe_cli::{cli, trace};

fn main() -> ExitCode {
    cli::run(|arguments: trace::Arguments| {
        cli::allocator(arguments.max_memory);
        let summary = trace::trace(&arguments)?;
        let trace::Summary { loss, tokens, loss_tokens, tensors } = summary;
        let out = arguments.out.display();
        Ok(format!("{tokens} tokens, loss {loss:.6} over {loss_tokens} predicted; {tensors} tensors in {out}\n"))
    })
}
