//! Text from a model.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

use clap::Parser;
use moe_core::Model;
use moe_core::data::{Conversation, Tokenizer};
use moe_core::generate::{GenerateOptions, Sampling, generate};
use serde_json::json;

use crate::{Error, Result, cli};

/// Continues prompts, streamed to the terminal
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Example: moe generate --model out/pruned --chat --prompt \"What is a mixture of experts?\"")]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// What to continue; repeatable [default: standard input]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Put prompts into the model's chat template, as the user's turn
    #[arg(long)]
    pub chat: bool,
    /// Adapter in PEFT's files to run the model with; repeatable
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
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
    /// Memory to stay within, such as 8GiB
    #[arg(long, value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// One JSON object per prompt on stdout
    #[arg(long)]
    pub json: bool,
}

/// Generates; what it returns is still to be printed.
///
/// # Errors
/// Whatever is wrong with the arguments, and whatever stops the model.
pub fn run(arguments: &Arguments) -> Result<String> {
    let device = moe_core::device::device(&arguments.device)?;
    let tokenizer = Tokenizer::from_dir(&arguments.model)?;
    let model = Model::open(&arguments.model, &device, arguments.max_memory)?;
    let model = crate::adapters::model_with(model, &arguments.adapter)?;
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
    let streamed = !arguments.json && prompts.len() == 1 && std::io::stdout().is_terminal();
    let mut out = String::new();
    for prompt in &prompts {
        let ids = match arguments.chat {
            true => {
                let messages = [json!({ "role": "user", "content": prompt })];
                tokenizer.encode_rendered(&tokenizer.render_chat(Conversation::new(&messages), true)?)?
            }
            false => tokenizer.encode(prompt)?,
        };
        let mut shown = 0;
        let mut ended = |completion: &[u32]| {
            let Ok(text) = tokenizer.decode(completion) else { return false };
            // A character may need the next token; it is shown with it.
            if streamed && !text.ends_with('\u{fffd}') && text.len() > shown {
                print!("{}", &text[shown..]);
                let _ = std::io::stdout().flush();
                shown = text.len();
            }
            arguments.stop.iter().any(|stop| text.contains(stop.as_str()))
        };
        let completion = generate(&model, &[ids], &options, &mut ended)?.concat();
        let text = tokenizer.decode(&completion)?;
        if arguments.json {
            out += &format!("{}\n", json!({ "prompt": prompt, "completion": text, "tokens": completion.len() }));
        } else if streamed {
            out += text.get(shown..).unwrap_or_default();
            out.push('\n');
        } else {
            out += &format!("{text}\n");
        }
    }
    Ok(out)
}
