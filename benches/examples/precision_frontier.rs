//! What is best at a given size: the bundled model (or `MODEL ROWS.jsonl`), whole and pruned, in one format and in
//! several, by bytes and by divergence from the whole model on calibration rows, as `moe quantize --frontier` has it:
//! `cargo run --release -p moe-benches --example precision_frontier -- [MODEL ROWS [OUT.html]]`.

use moe::jobs::{FrontierOptions, frontier, rows};
use moe::prelude::*;
use moe::progress::Progress;
use moe::report::{Report, frontier_table};
use moe_core::data::WaveOptions;

/// Rows that divergences are measured on.
const ROWS: usize = 24;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let tiny = moe_cli::TINY_MOE;
    let directory = arguments.first().map_or(tiny, String::as_str);
    let calibration = arguments.get(1).cloned().unwrap_or(format!("{tiny}/data/facts_calibration.jsonl"));
    let whole = Model::open(directory, &device("default")?, None)?;
    let data = rows(&whole, &calibration, ROWS)?;
    let options = FrontierOptions::default();
    let points = frontier(&whole, &data, WaveOptions::default(), &options, Progress::stderr())?;
    println!("{}", frontier_table(&points).to_text());
    if let Some(out) = arguments.get(2) {
        let mut report = Report::new("Bits, experts and units at equal bytes");
        report.frontier(&points)?;
        report.write(out)?;
        println!("{out}");
    }
    Ok(())
}
