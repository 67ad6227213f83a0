//! What is best at a given size: whole and pruned models of the bundled model (or of `MODEL ROWS.jsonl`) in one format
//! and in several, by bytes and by divergence from the whole model on calibration rows:
//! `cargo run --release -p moe-benches --example precision_frontier -- [MODEL ROWS [OUT.html]]`. Experts go by REAP.

use moe::jobs::{prune, rows, score};
use moe::prelude::*;
use moe::report::{FrontierPoint, Report, frontier_table};
use moe_checkpoint::{BasePrecision, WeightFormat};
use moe_core::data::WaveOptions;
use moe_core::{Engine, EngineOptions};
use moe_prune::{EngineProbe, MixedPrecision, PrecisionAllocation, ProbeOptions};

/// Rows that divergences are measured on.
const ROWS: usize = 24;
/// Budgets between all experts in the smallest and in the largest format.
const BUDGETS: u64 = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let tiny = moe_cli::TINY_MOE;
    let directory = arguments.first().map_or(tiny, String::as_str);
    let calibration = arguments.get(1).cloned().unwrap_or(format!("{tiny}/data/facts_calibration.jsonl"));
    let whole = Model::open(directory, &device("default")?, None)?;
    let data = rows(&whole, &calibration, ROWS)?;
    let scores = score(&whole, &data, &Reap::default())?;
    let engine = Engine::new(&whole, EngineOptions::default());
    let probe = EngineProbe::new(&engine, data.waves(WaveOptions::default()), ProbeOptions::default())?;

    let mut models = vec![("all experts".to_string(), whole.with_overlays(None, None)?)];
    for ratio in [0.25, 0.5] {
        let pruner = ExpertPruner::new().for_routing(&whole.config().routing);
        let pruned = prune(&whole, &scores, &pruner, Budget::Ratio(ratio), PruneForm::Uniform)?;
        models.push((format!("{:.0}% pruned", 100.0 * ratio), pruned));
    }
    let formats: Vec<WeightFormat> = [BasePrecision::Int4, BasePrecision::Int6, BasePrecision::Int8]
        .map(|precision| precision.format(whole.checkpoint()))
        .into();
    let mut points = Vec::new();
    for (name, model) in &models {
        let checkpoint = model.checkpoint();
        points.push(FrontierPoint {
            of: format!("{name}, one format"),
            what: "BF16".into(),
            bytes: checkpoint.bytes_on_disk(),
            divergence: probe.distortion_of(model)?.mean,
        });
        let measured = |allocation: &PrecisionAllocation| -> Result<(u64, f64), Box<dyn std::error::Error>> {
            let quantized = allocation.on(checkpoint, None)?;
            let bytes = quantized.model().bytes_on_disk();
            let model = Model::new(quantized.model().clone(), whole.device(), None)?;
            Ok((bytes, probe.distortion_of(&model)?.mean))
        };
        let sensitivities = MixedPrecision::new(formats.clone()).measure(model, &probe, &mut |_, _| ())?;
        let mut ends = Vec::new();
        for format in &formats {
            let Some(allocation) = sensitivities.uniform(Some(format)) else { continue };
            let (bytes, divergence) = measured(&allocation)?;
            ends.push(bytes);
            points.push(FrontierPoint {
                of: format!("{name}, one format"),
                what: format.to_string(),
                bytes,
                divergence,
            });
        }
        let (least, most) = (ends[0], ends[ends.len() - 1]);
        for step in 1..=BUDGETS {
            let budget = least + step * (most - least) / (BUDGETS + 1);
            let allocation = sensitivities.allocate(budget)?;
            let (bytes, divergence) = measured(&allocation)?;
            let what = format!("{:.2} bits, {:.4} predicted", allocation.bits, allocation.predicted);
            points.push(FrontierPoint { of: format!("{name}, by layer"), what, bytes, divergence });
        }
    }
    println!("{}", frontier_table(&points).to_text());
    if let Some(out) = arguments.get(2) {
        let mut report = Report::new("Bits and experts at equal bytes");
        report.frontier(&points)?;
        report.write(out)?;
        println!("{out}");
    }
    Ok(())
}
