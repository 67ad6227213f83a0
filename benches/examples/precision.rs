//! What `--precision bf16` changes: the speed of one pass that scores by every scorer, and for each of them the rank
//! correlation of its scores with those in f32 within layers, and the share of what is dropped that is the same at 25,
//! 50 and 75%: `cargo run --release -p moe-benches --example precision -- [MODEL ROWS.jsonl [ROWS]]`.

use std::time::Instant;

use moe::jobs::rows;
use moe::table::Table;
use moe_checkpoint::ScoreTable;
use moe_core::data::WaveOptions;
use moe_core::device::device;
use moe_core::{Model, Precision};
use moe_importance::{Calibration, Scorer, ScorerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = arguments.first().map_or(moe_cli::TINY_MOE, String::as_str);
    let file = arguments.get(1).cloned().unwrap_or(format!("{directory}/data/prose_calibration.jsonl"));
    let number: usize = arguments.get(2).map_or(Ok(200), |text| text.parse())?;
    let device = device("flex")?;
    if !Precision::Bf16.is_available(&device) {
        return Err("this processor has no products of bf16 (AVX-512-BF16)".into());
    }
    let names = ScorerConfig::NAMES.iter().copied().filter(|name| *name != "random");
    // Those with parameters that have no defaults are left out, and said.
    let mut scorers: Vec<Box<dyn Scorer>> = Vec::new();
    for name in names {
        match serde_json::from_value::<ScorerConfig>(serde_json::json!({ "type": name })) {
            Ok(config) => scorers.push(config.build()?),
            Err(error) => println!("without {name}: {error}"),
        }
    }
    let mut tables: Vec<Vec<ScoreTable>> = Vec::new();
    let mut seconds = Vec::new();
    for precision in Precision::ALL {
        let model = Model::open(directory, &device, None)?.with_precision(precision);
        let data = rows(&model, &file, number)?;
        let calibration = Calibration::new(&model, &data, WaveOptions::default());
        let start = Instant::now();
        let statistics = calibration.scorers(scorers.iter().map(|scorer| &**scorer)).run(&mut |_| ())?;
        let took = start.elapsed().as_secs_f64();
        println!("{precision}: {} tokens in {took:.2} s, {:.0} tokens/s", data.tokens(), data.tokens() as f64 / took);
        seconds.push(took);
        let scored = scorers.iter().map(|scorer| scorer.score(&statistics, model.checkpoint().as_ref()));
        tables.push(scored.collect::<Result<_, _>>()?);
    }
    println!("ratio of the times {:.2}\n", seconds[0] / seconds[1]);
    let mut table = Table::new(["scorer", "rank correlation", "25%", "50%", "75%"], 1);
    for ((scorer, exact), rounded) in scorers.iter().zip(&tables[0]).zip(&tables[1]) {
        let layers: Vec<(Vec<f64>, Vec<f64>)> =
            exact.layers.iter().zip(&rounded.layers).map(|(a, b)| (a.flat(), b.flat())).collect();
        let mean =
            |f: &dyn Fn(&[f64], &[f64]) -> f64| layers.iter().map(|(a, b)| f(a, b)).sum::<f64>() / layers.len() as f64;
        let overlaps = [0.25, 0.5, 0.75].map(|share| format!("{:.4}", mean(&|a, b| overlap(a, b, share))));
        let mut row = vec![scorer.name().to_string(), format!("{:.5}", mean(&|a, b| correlation(a, b)))];
        row.extend(overlaps);
        table.row(row);
    }
    println!("{}", table.to_text());
    Ok(())
}

/// Positions in ascending order of the values, the first first where they are equal.
fn order(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    order
}

/// Spearman's correlation.
fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| {
        let mut ranks = vec![0.0; values.len()];
        order(values).into_iter().enumerate().for_each(|(rank, at)| ranks[at] = rank as f64);
        ranks
    };
    let n = a.len() as f64;
    let squares: f64 = ranks(a).iter().zip(ranks(b)).map(|(a, b)| (a - b).powi(2)).sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

/// Of the lowest `share` of `a`, how many are among the lowest of `b`.
fn overlap(a: &[f64], b: &[f64], share: f64) -> f64 {
    let count = ((a.len() as f64 * share) as usize).max(1);
    let mut lowest = vec![false; b.len()];
    order(b).into_iter().take(count).for_each(|at| lowest[at] = true);
    order(a).into_iter().take(count).filter(|at| lowest[*at]).count() as f64 / count as f64
}
