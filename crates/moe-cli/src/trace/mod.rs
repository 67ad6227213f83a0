//! Writing what a model computes on given tokens: logits, loss, layer inputs, router logits, gradients of experts.
//!
//! With it anyone can compare this implementation with another one, number by number.

mod output;
mod recorder;
mod tokens;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use moe_core::data::{Sequence, WaveOptions, waves};
use moe_core::{Engine, EngineOptions, Model};
use moe_peft::lora::{Lora, Maps};
use moe_peft::{AdapterSet, peft_files};

pub use output::TensorOutput;
pub use tokens::Tokens;

use crate::{Error, Result, cli};
use recorder::{Recorder, gradient_name};

/// Runs a model on given tokens and writes every number to a safetensors file
///
/// The tensors are `logits [B,S,V]`, `loss []`, `hidden.{i} [B,S,H]` (the input of each decoder layer),
/// `router_logits.{n} [B*S,E]` (n counts MoE layers) and, if asked for, `grad.layer.{i}.expert.{e}.{gate,up,down}`, all
/// f32.
///
/// The loss is the mean cross-entropy over all predicted tokens. Positions whose attention_mask is 0 are not run: they
/// are zeros in the output and predict nothing.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "trace",
    after_help = "Example: moe trace --model DIR --tokens rows.jsonl --out trace.safetensors --grads"
)]
pub struct Arguments {
    /// Hugging Face model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Directory of a LoRA in PEFT's files, to run the model with
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// .safetensors with `input_ids [B,S]` and perhaps `attention_mask`, or rows: .jsonl, .json, .jsonl.gz, .parquet or
    /// a folder
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// How rows are read
    #[command(flatten)]
    pub rows: cli::RowArguments,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Memory to stay within, such as 2GiB; does not change results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// Write gradients of the loss at the weights of the routed experts, zeros for experts that got no token
    #[arg(long)]
    pub grads: bool,
    /// flex (CPU), wgpu, vulkan, cuda, or default: the fastest that is compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// Tokens run together; a longer row is run by itself
    #[arg(long, value_name = "TOKENS", default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What was run.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// Tokens run.
    pub tokens: usize,
    /// Tokens predicted.
    pub loss_tokens: usize,
    /// Tensors written.
    pub tensors: usize,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { loss, tokens, loss_tokens, tensors } = self;
        writeln!(f, "{tokens} tokens, loss {loss:.6} over {loss_tokens} predicted; {tensors} tensors written")
    }
}

/// Runs the model and writes the file.
///
/// # Errors
/// Everything that can be wrong with the arguments, before the model is run; then whatever stops it.
pub fn trace(arguments: &Arguments) -> Result<Summary> {
    let device = moe_core::device::device(&arguments.device)?;
    let mut model = Model::open(&arguments.model, &device, arguments.max_memory)?;
    if let Some(adapter) = &arguments.adapter {
        model = adapted(&model, adapter, &device)?;
    }
    let config = model.config();
    let tokens = Tokens::load(&arguments.tokens, &arguments.rows.reading(), &arguments.model, config.vocab_size)?;
    let (sequences, mut positions): (Vec<Sequence>, Vec<Vec<usize>>) = tokens.sequences().into_iter().unzip();
    let loss_tokens: usize = sequences.iter().map(Sequence::loss_tokens).sum();
    if loss_tokens == 0 {
        let path = arguments.tokens.display();
        return Err(Error::Invalid(format!("{path}: nothing is predicted: every row has fewer than two tokens")));
    }

    let layout = layout(&model, &tokens, arguments.grads);
    let waves = waves(&sequences, WaveOptions::Tokens(arguments.wave_tokens));
    let engine = Engine::new(&model, EngineOptions::default());
    let signals = Recorder::signals(arguments.grads);
    for wave in &waves {
        engine.plan(wave.tokens(), signals)?;
    }
    let mut recorder = Recorder {
        output: TensorOutput::create(&arguments.out, &layout)?,
        positions: Vec::new(),
        moe_layers: model.checkpoint().shape().layers.iter().map(|layer| layer.layer).collect(),
        gradients_over: arguments.grads.then_some(loss_tokens),
    };
    let mut loss = 0.0;
    for wave in &waves {
        recorder.positions = positions.drain(..wave.sequences.len()).flatten().collect();
        loss += engine.run(wave, &mut recorder)?.loss.unwrap_or_default();
    }
    let loss = loss / loss_tokens as f64;
    recorder.output.write("loss", 0, &[loss as f32])?;
    recorder.output.finish()?;
    let run = sequences.iter().map(Sequence::len).sum();
    Ok(Summary { loss, tokens: run, loss_tokens, tensors: layout.len() })
}

/// The model with an adapter.
fn adapted(model: &Model, adapter: &Path, device: &Device) -> Result<Model> {
    let mut set = AdapterSet::new();
    let maps = Maps::new(model.checkpoint());
    let weights = peft_files::read(adapter, &maps, peft_files::ReadOptions::default())?;
    Lora::install(&mut set, &maps, &[("default", weights)], device)?;
    Ok(model.with_adapters(Arc::new(set))?)
}

/// Names and shapes of all tensors of the output.
fn layout(model: &Model, tokens: &Tokens, gradients: bool) -> Vec<(String, Vec<usize>)> {
    let (config, shape) = (model.config(), model.checkpoint().shape());
    let (b, s, h) = (tokens.rows, tokens.length, config.hidden_size);
    let mut layout = vec![("logits".into(), vec![b, s, config.vocab_size]), ("loss".into(), vec![])];
    layout.extend((0..config.layers.len()).map(|layer| (format!("hidden.{layer}"), vec![b, s, h])));
    for (n, layer) in shape.layers.iter().enumerate() {
        layout.push((format!("router_logits.{n}"), vec![b * s, layer.num_experts()]));
    }
    for layer in shape.layers.iter().filter(|_| gradients) {
        for (expert, width) in layer.widths.iter().enumerate() {
            for (part, shape) in [("gate", [*width, h]), ("up", [*width, h]), ("down", [h, *width])] {
                layout.push((gradient_name(layer.layer, expert, part), shape.to_vec()));
            }
        }
    }
    layout
}
