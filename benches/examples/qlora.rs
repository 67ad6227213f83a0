//! Memory and loss of a LoRA on bases of several precisions against the BF16 base, three draws of the adapter and of
//! the order of rows each: `cargo run --release -p moe-benches --example qlora -- [MODEL ROWS.jsonl [STEPS]]`, by
//! default on the bundled model and the rows of division, which it has never seen. Losses are of rows that were not
//! trained on.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe::jobs::training_rows;
use moe::table::Table;
use moe_checkpoint::{BasePrecision, Checkpoint};
use moe_core::data::{Wave, WaveOptions};
use moe_core::device::device;
use moe_core::memory::{process_memory, reset_peak};
use moe_core::trace::Nobody;
use moe_core::{Engine, EngineOptions, Model};
use moe_peft::fold::{FoldPrecision, Folded};
use moe_peft::{Recipe, TrainingRun};

type Error = Box<dyn std::error::Error>;

/// Draws of rows and of the start of the adapters.
const DRAWS: u64 = 3;
/// Rows, of which a fifth is for measuring.
const ROWS: usize = 600;

fn loss(model: &Model, waves: &[Wave]) -> Result<f64, Error> {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    let (mut sum, mut tokens) = (0.0, 0);
    for wave in waves {
        let report = engine.run(wave, &mut Nobody)?;
        sum += report.loss.unwrap_or(0.0);
        tokens += report.loss_tokens;
    }
    Ok(sum / tokens.max(1) as f64)
}

/// Mean and spread of some draws.
fn spread(values: &[f64]) -> String {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    format!("{mean:.3} ({low:.3} to {high:.3})")
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = arguments.first().map_or(moe_cli::TINY_MOE, String::as_str);
    let rows = arguments.get(1).cloned().unwrap_or(format!("{directory}/data/division_train.jsonl"));
    let steps: usize = arguments.get(2).map_or(Ok(60), |text| text.parse())?;
    let device = device("default")?;
    let base = Arc::new(Checkpoint::open(directory)?);
    let plain = Model::new(base.clone(), &device, None)?;
    let waves = training_rows(&plain, &rows, ROWS)?.waves(WaveOptions::Tokens(512.try_into()?));
    let (train, test) = waves.split_at(waves.len() - waves.len().div_ceil(5));

    let mut table = Table::new(
        ["base", "base, bytes", "peak of training, MiB", "loss before", "trained", "folded to bf16", "folded as base"],
        1,
    );
    let names = [None, Some("int8"), Some("fp8"), Some("nf4"), Some("nvfp4"), Some("mxfp4"), Some("int4")];
    for name in names {
        let (model, bytes) = match name {
            None => (Model::new(base.clone(), &device, None)?, base.bytes_on_disk()),
            Some(name) => {
                let quantized = name.parse::<BasePrecision>()?.on(&base)?.model().clone();
                let bytes = quantized.bytes_on_disk();
                (Model::new(quantized, &device, None)?.with_weights_decoded_per_use(), bytes)
            }
        };
        let before = loss(&model, test)?;
        let (mut peak, mut trained_losses, mut bf16, mut as_base) = (0u64, Vec::new(), Vec::new(), Vec::new());
        for draw in 0..DRAWS {
            let mut recipe: Recipe = serde_json::from_value(serde_json::json!({
                "method": {"type": "lora", "r": 8, "lora_alpha": 16,
                    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
                "train": {"max_steps": steps, "epochs": steps, "schedule": {"peak": 2e-3}},
            }))?;
            recipe.set_seed(draw);
            let out = std::env::temp_dir().join(format!("moe-benches-qlora-{}", std::process::id()));
            let labels = BTreeMap::new();
            let run = TrainingRun {
                model: &model,
                waves: train,
                labels: &labels,
                directory: &out,
                save_every: usize::MAX,
                resume: false,
                fold: FoldPrecision::Bf16,
            };
            reset_peak();
            let trained = run.train(&recipe, &mut |_| Ok(()))?;
            peak = peak.max(process_memory().map_or(0, |memory| memory.peak));
            trained_losses.push(loss(trained.task.model(), test)?);
            for (precision, losses) in [(FoldPrecision::Bf16, &mut bf16), (FoldPrecision::AsBase, &mut as_base)] {
                let folded = Folded::in_precision(model.checkpoint(), trained.task.set(), precision)?;
                losses.push(loss(&folded.run(&device, None)?, test)?);
            }
            std::fs::remove_dir_all(&out)?;
        }
        table.row([
            name.unwrap_or("bf16").to_string(),
            bytes.to_string(),
            format!("{:.1}", peak as f64 / (1 << 20) as f64),
            format!("{before:.3}"),
            spread(&trained_losses),
            spread(&bf16),
            spread(&as_base),
        ]);
    }
    println!("{}", table.to_text());
    println!(
        "{DRAWS} draws, {steps} steps, rank 8 beside attention and experts; losses in nats per token, mean (least to most)"
    );
    Ok(())
}
