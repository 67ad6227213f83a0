//! A small Mixture of Experts from scratch: a language model of bytes, trained on text, with the loads of its experts,
//! and written as a stock Qwen2-MoE.
//!
//! `cargo run --release -p moe-nn --example train_moe [TEXT [OUT [STEPS]]]`; afterwards, for example,
//! `moe prune --model OUT ...`. The loop is written out: `burn-train` would add features to Burn for whoever builds
//! these crates.

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_optim::{AdamWConfig, GradientsParams};
use moe_checkpoint::{Existing, WriteOptions, write};
use moe_nn::{AttentionConfig, LossWeights, MoeConfig, RoutingRecord, SharedExpertConfig, TransformerConfig};

const BATCH: usize = 8;
const LENGTH: usize = 64;

/// Sequences of bytes of a text `[batch, length]`, one after the other from places that depend on the step.
fn batch(text: &[u8], step: usize, device: &Device) -> Tensor<2, Int> {
    let start = |row: usize| (step * 7919 + row * 104_729) % (text.len() - LENGTH);
    let ids = (0..BATCH).flat_map(|row| text[start(row)..][..LENGTH].iter().map(|byte| i64::from(*byte)));
    Tensor::from_data(TensorData::new(ids.collect::<Vec<i64>>(), [BATCH, LENGTH]), device)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let text = match arguments.next() {
        Some(path) => std::fs::read(path)?,
        None => include_bytes!("../src/experts/mod.rs").to_vec(),
    };
    let out = arguments.next().unwrap_or_else(|| "out/trained-moe".to_string());
    let steps = arguments.next().map_or(Ok(300), |steps| steps.parse::<usize>())?;
    if text.len() <= 2 * LENGTH {
        return Err(format!("the text has {} bytes, expected more than {}", text.len(), 2 * LENGTH).into());
    }
    // The last tenth is held out.
    let (training, held_out) = text.split_at((text.len() * 9 / 10).min(text.len() - LENGTH - 1));

    let device = Device::default().autodiff();
    device.seed(0);
    let losses = LossWeights { balance: 0.01, z: 0.001, ..LossWeights::default() };
    let moe = MoeConfig::new(64, 64, 8)
        .with_top_k(2)
        .with_shared(Some(SharedExpertConfig::new(64, 64).with_gated(true)))
        .with_losses(losses);
    let attention = AttentionConfig::new(4, 2, 16).with_qkv_bias(true);
    let config = TransformerConfig::new(256, 64, 2, attention, moe);
    let mut model = config.init(&device);
    println!("{} parameters, {} bytes of text", model.num_params(), training.len());
    let mut optimizer = AdamWConfig::new().init();
    let start = Instant::now();
    for step in 0..steps {
        let ids = batch(training, step, &device);
        let output = model.forward(ids.clone());
        let loss = output.next_token_loss(ids);
        if step % 50 == 0 || step + 1 == steps {
            let loads: Vec<f32> =
                output.routings.iter().map(|routing| RoutingRecord::of(routing).max_over_mean).collect();
            let nats: f32 = loss.clone().into_scalar();
            println!("step {step:>5}: {nats:.3} nats per byte, largest load over the mean by layer {loads:.2?}");
        }
        let total = match output.router_loss {
            Some(router_loss) => loss + router_loss,
            None => loss,
        };
        let gradients = GradientsParams::from_grads(total.backward(), &model);
        model = optimizer.step(3e-3, model, gradients);
    }
    let valid = model.valid();
    let plain = Device::default();
    let ids = batch(held_out, 0, &plain);
    let held: f32 = valid.forward(ids.clone()).next_token_loss(ids).into_scalar();
    println!("{:.0} s; held out: {held:.3} nats per byte", start.elapsed().as_secs_f64());

    let checkpoint = valid.to_checkpoint(&config, None)?;
    write(&checkpoint, &out, &WriteOptions { existing: Existing::Force, ..WriteOptions::default() })?;
    println!("{out}: a `{}`; next, for example: moe inspect {out}", checkpoint.config().model_type);
    Ok(())
}
