//! Text from a model.

use std::io::{Read, Write};
use std::path::PathBuf;

use clap::Parser;
use moe_core::Model;
use moe_core::data::{Conversation, Source, Tokenizer};
use moe_core::generate::{GenerateOptions, Sampling, generate_with};
use serde_json::json;

use crate::{Error, Result, cli};

/// Continues prompts, streamed to the terminal
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe generate --model out/pruned --chat --prompt \"What is a mixture of experts?\"\n  \
moe generate --model DIR --rows code.jsonl=2 --rows prose.jsonl --temperature 0.7 --for-calibration own.jsonl"
)]
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
    /// Instead of printing, write rows to calibrate on to this file: the prompts of --rows with what the model makes of
    /// them, as tokens, of which those of the model count in a loss over answers
    #[arg(long, value_name = "FILE", requires = "rows", conflicts_with_all = ["prompt", "chat", "json"])]
    pub for_calibration: Option<PathBuf>,
    /// Rows whose prompts are continued: what stands before their first answer, or the first tokens of a text;
    /// repeatable, FILE=WEIGHT for other shares
    #[arg(long, value_name = "FILE[=WEIGHT]", requires = "for_calibration")]
    pub rows: Vec<Source>,
    /// Rows, at most, over all files
    #[arg(long, default_value_t = 128, requires = "for_calibration")]
    pub samples: usize,
    /// Tokens of a text that are its prompt
    #[arg(long, default_value_t = 32, value_parser = cli::at_least(1), requires = "for_calibration")]
    pub text_tokens: usize,
    /// Tokens of a prompt, at most: the last ones
    #[arg(long, default_value_t = 1024, value_parser = cli::at_least(1), requires = "for_calibration")]
    pub prompt_tokens: usize,
    /// How the next token is found
    #[command(flatten)]
    pub decoding: crate::adapters::DecodingArguments,
    /// One JSON object per prompt on stdout
    #[arg(long)]
    pub json: bool,
}

impl Arguments {
    /// How a prompt is continued.
    pub(crate) fn options(&self, tokenizer: &Tokenizer, model: &Model) -> GenerateOptions {
        let sampling = match self.temperature {
            None => Sampling::Greedy,
            Some(temperature) => Sampling::TopP { temperature, top_p: self.top_p, seed: self.seed },
        };
        let stop = tokenizer.eos_ids().iter().chain(&model.config().eos_token_ids).copied().collect();
        GenerateOptions { max_new_tokens: self.max_new_tokens, sampling, stop, ..GenerateOptions::default() }
    }
}

/// Generates; what it returns is still to be printed.
///
/// # Errors
/// Whatever is wrong with the arguments, and whatever stops the model.
pub fn run(arguments: &Arguments) -> Result<String> {
    let tokenizer = Tokenizer::from_dir(&arguments.model.model)?;
    let (model, sources) = arguments.decoding.sources(&arguments.model)?;
    let decoding = sources.decoding(&model)?;
    if let Some(to) = &arguments.for_calibration {
        return crate::own_rows::write(arguments, &tokenizer, &model, &decoding, to);
    }
    let mut prompts = arguments.prompt.clone();
    if prompts.is_empty() {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(Error::io("standard input"))?;
        prompts.push(text.trim_end_matches('\n').to_string());
    }
    let options = arguments.options(&tokenizer, &model);
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
