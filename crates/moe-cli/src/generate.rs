//! Text from a model.

use std::io::{Read, Write};

use clap::Parser;
use moe_core::data::{Conversation, Tokenizer};
use moe_core::generate::{GenerateOptions, Sampling, generate_with};
use serde_json::json;

use crate::{Error, Result, cli};

/// Continues prompts, streamed to the terminal
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Example: moe generate --model out/pruned --chat --prompt \"What is a mixture of experts?\"")]
pub struct Arguments {
    /// What continues them
    #[command(flatten)]
    pub model: crate::adapters::ModelArguments,
    /// What to continue; repeatable [default: standard input]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Put prompts into the model's chat template, as the user's turn
    #[arg(long)]
    pub chat: bool,
    /// New tokens per prompt, at most
    #[arg(long, default_value_t = 256, value_parser = cli::at_least(1))]
    pub max_new_tokens: usize,
    /// Sample at this temperature instead of taking the most likely token
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Sample from the smallest set of tokens whose probability reaches this
    #[arg(long, default_value_t = 0.95, requires = "temperature")]
    pub top_p: f32,
    /// Seed of sampling
    #[arg(long, default_value_t = 0, requires = "temperature")]
    pub seed: u64,
    /// Text that ends a completion; repeatable
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// How the next token is found
    #[command(flatten)]
    pub decoding: crate::adapters::DecodingArguments,
    /// One JSON object per prompt on stdout
    #[arg(long)]
    pub json: bool,
}

/// Generates; what it returns is still to be printed.
///
/// # Errors
/// Whatever is wrong with the arguments, and whatever stops the model.
pub fn run(arguments: &Arguments) -> Result<String> {
    let tokenizer = Tokenizer::from_dir(&arguments.model.model)?;
    let (model, sources) = arguments.decoding.sources(&arguments.model)?;
    let decoding = sources.decoding(&model)?;
    let mut prompts = arguments.prompt.clone();
    if prompts.is_empty() {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(Error::io("standard input"))?;
        prompts.push(text.trim_end_matches('\n').to_string());
    }
    let sampling = match arguments.temperature {
        None => Sampling::Greedy,
        Some(temperature) => Sampling::TopP { temperature, top_p: arguments.top_p, seed: arguments.seed },
    };
    let stop: Vec<u32> = tokenizer.eos_ids().iter().chain(&model.config().eos_token_ids).copied().collect();
    let options =
        GenerateOptions { max_new_tokens: arguments.max_new_tokens, sampling, stop, ..GenerateOptions::default() };
    // Text appears as it is made; JSON is of whole completions.
    let streamed = !arguments.json;
    let mut out = String::new();
    for prompt in &prompts {
        let ids = match arguments.chat {
            true => {
                let messages = [json!({ "role": "user", "content": prompt })];
                tokenizer.encode_rendered(&tokenizer.render_chat(Conversation::new(&messages), true)?)?
            }
            false => tokenizer.encode(prompt)?,
        };
        let (mut shown, mut stdout_gone) = (0, false);
        let mut ended = |completion: &[u32]| {
            let Ok(text) = tokenizer.decode(completion) else { return false };
            // A character may need the next token; it is shown with it.
            if streamed && !text.ends_with('\u{fffd}') && text.len() > shown {
                stdout_gone |= show(&text[shown..]).is_err();
                shown = text.len();
            }
            stdout_gone || arguments.stop.iter().any(|stop| text.contains(stop.as_str()))
        };
        let (completion, report) = generate_with(&model, &[ids], &options, &decoding, &mut ended)?;
        let completion = completion.concat();
        let text = tokenizer.decode(&completion)?;
        if arguments.json {
            let mut told = json!({ "prompt": prompt, "completion": text, "tokens": completion.len() });
            if !sources.is_plain() {
                told["decoding"] = json!(report);
            }
            out += &format!("{told}\n");
        } else if !stdout_gone {
            let rest = text.get(shown..).unwrap_or_default();
            // Whoever reads may have gone, as head does.
            let _ = show(&format!("{rest}\n"));
            if let Some(share) = report.acceptance() {
                let (accepted, proposed) = (100.0 * share, report.proposed);
                eprintln!(
                    "{} tokens in {} steps, {accepted:.1}% of {proposed} proposals accepted",
                    report.tokens, report.steps
                );
            }
        }
    }
    Ok(out)
}

/// Puts text on the terminal at once.
fn show(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
