//! What decoding costs: reading every routed expert of the bundled model (or of `MODEL`) from memory in each format,
//! and the products of some rows with it, against BF16: `cargo run --release -p moe-benches --example quantized_speed
//! --
//! [MODEL]`. The fastest of several passes counts; one thread per core.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use moe::table::Table;
use moe_checkpoint::{BasePrecision, Checkpoint, ExpertWeights, QuantizeOptions, Quantized, WeightFormat};
use moe_core::device::device;
use moe_core::experts::ExpertTensors;
use moe_core::host;

/// Passes that are timed.
const PASSES: usize = 5;
/// Rows of the products: a token in generation, some, a wave.
const ROWS: [usize; 3] = [1, 16, 256];

/// Seconds of the fastest pass.
fn fastest(mut pass: impl FnMut() -> moe_checkpoint::Result<()>) -> moe_checkpoint::Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn experts(model: &Checkpoint) -> Vec<(usize, usize)> {
    let of = |layer: &moe_checkpoint::MoeLayerShape| {
        let number = layer.layer;
        (0..layer.num_experts()).map(move |expert| (number, expert)).collect::<Vec<_>>()
    };
    model.shape().layers.iter().flat_map(of).collect()
}

/// Seconds to decode all experts, and to decode them and multiply so many rows.
fn times(model: &Checkpoint, device: &Device) -> moe_checkpoint::Result<(f64, [f64; 3])> {
    let all = experts(model);
    let mut weights = ExpertWeights::default();
    let decode =
        fastest(|| all.iter().try_for_each(|(layer, expert)| model.expert_into(*layer, *expert, &mut weights)))?;
    let hidden = model.config().hidden_size;
    let mut products = [0.0; 3];
    for (seconds, rows) in products.iter_mut().zip(ROWS) {
        let values = (0..rows * hidden).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.5).collect();
        let x = host::from_vec(values, [rows, hidden], device);
        *seconds = fastest(|| {
            for (layer, expert) in &all {
                let expert = ExpertTensors::new(model.expert(*layer, *expert)?, device);
                let y = expert.output(&expert.units(&expert.pre_activations(&x)));
                std::hint::black_box(host::into_vec(y));
            }
            Ok(())
        })?;
    }
    Ok((decode, products))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args().nth(1).unwrap_or(moe_cli::TINY_MOE.to_string());
    let base = Arc::new(Checkpoint::open(&directory)?);
    let device = device("flex")?;
    let elements = base.shape().parameters();
    let names = ["fp8", "int8", "int6", "int4", "mxfp4", "nvfp4", "nf4"];
    let mut formats: Vec<(String, Option<WeightFormat>)> = vec![("bf16".into(), None)];
    for name in names {
        formats.push((name.into(), Some(name.parse::<BasePrecision>()?.format(&base))));
    }
    let mut header = vec!["format".to_string(), "bits per weight".into(), "decode, Mweights/s".into()];
    header.extend(ROWS.map(|rows| format!("decode + product of {rows}, ms")));
    header.extend(ROWS.map(|rows| format!("{rows} against bf16")));
    let mut table = Table::new(header, 1);
    let mut plain: Option<[f64; 3]> = None;
    for (name, format) in formats {
        let model = match &format {
            Some(format) => Quantized::on(&base, &QuantizeOptions::new(format.clone()))?.model().packed_in_memory()?,
            None => base.clone(),
        };
        let mut bytes = 0;
        for layer in &model.shape().layers {
            bytes += model.expert_bytes_on_disk(layer.layer)?;
        }
        let (decode, products) = times(&model, &device)?;
        let against = *plain.get_or_insert(products);
        let mut row = vec![name, format!("{:.2}", 8.0 * bytes as f64 / elements as f64)];
        row.push(format!("{:.0}", elements as f64 / decode / 1e6));
        row.extend(products.map(|seconds| format!("{:.1}", 1e3 * seconds)));
        row.extend(products.iter().zip(against).map(|(seconds, plain)| format!("{:.2}", seconds / plain)));
        table.row(row);
    }
    println!("{}", table.to_text());
    println!("{} routed experts of {directory}, {elements} weights", experts(&base).len());
    Ok(())
}
