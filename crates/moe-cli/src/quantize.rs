//! Quantization of a checkpoint.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use moe::jobs::{
    FrontierOptions, QuantizeCalibration, QuantizeRows, QuantizeWith, QuantizedModel, frontier, quantize_calibrated,
    quantize_mixed,
};
use moe::recipe::MixedBits;
use moe::report::{FrontierPoint, equal_bytes_table, frontier_table};
use moe_checkpoint::group::Alone;
use moe_checkpoint::{
    BasePrecision, Checkpoint, Existing, QuantizeOptions, QuantizeReport, Quantized, QuantizedPart, RouterRounding,
    Smoothing, WeightFormat, WriteOptions, check_output, write,
};
use moe_core::Model;
use moe_core::data::{Dataset, Tokenizer};
use moe_prune::{PrecisionAllocation, PrecisionGroup};
use serde::Serialize;

use crate::progress::{Progress, Unit};
use crate::{Error, Result, cli};

/// Rounds the weights of a model to few bits, in the files that engines serve
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Formats: fp8_blocks (DeepSeek), fp8_channels, int4 and int8 in groups of 128, nvfp4 (compressed-tensors), mxfp4 (gpt-oss in its own \
layout)\n\nExamples:\n  moe quantize --model Qwen3-30B-A3B --format int4 --out Qwen3-int4\n  \
moe quantize --model DIR --format '{\"type\": \"int\", \"bits\": 4, \"group_size\": 32}' --part linear --out OUT --json\n  \
moe quantize --model DIR --format int4 --calibration rows.jsonl --samples 64 --out OUT\n  \
moe quantize --model DIR --format int4 --smooth awq --calibration rows.jsonl --samples 64 --out OUT\n  \
moe quantize --model DIR --mixed int4,int8 --keep-bytes 20GiB --calibration rows.jsonl --samples 64 --out OUT\n  \
moe quantize --model DIR --frontier --calibration rows.jsonl --samples 24 --out FRONTIER"
)]
#[command(group(clap::ArgGroup::new("budget").args(["keep_bytes", "frontier"])))]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The format: a name, or JSON with its parameters
    #[arg(long, value_name = "NAME|JSON", value_parser = format, required_unless_present_any = ["mixed", "frontier"])]
    pub format: Option<WeightFormat>,
    /// Several precisions, separated by commas, of which every layer gets the one that changes the model least within
    /// --keep-bytes, measured on the rows of --calibration: int4, int6, int8, fp8, mxfp4, nvfp4
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = precision, requires = "budget")]
    pub mixed: Vec<BasePrecision>,
    /// With --mixed, bytes of the whole model at most, such as 8GiB
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes, requires = "mixed")]
    pub keep_bytes: Option<u64>,
    /// Write no model, but a report of what is best at a given size on the rows of --calibration: the whole model and
    /// ones with experts or units pruned, in every precision of --mixed (int4,int6,int8 if none are given), by layer
    /// and in one; OUT becomes a folder with report.html and frontier.json
    #[arg(long, conflicts_with_all = ["format", "nearest", "smooth", "router_bits", "balance", "resume"])]
    pub frontier: bool,
    /// With --frontier, shares that are pruned, of experts and of units
    #[arg(long, value_name = "SHARES", value_delimiter = ',', default_value = "0.25,0.5", requires = "frontier")]
    pub ratios: Vec<f64>,
    /// With --mixed, what gets one precision: the experts of a layer, or every expert by itself
    #[arg(long, value_name = "GROUP", default_value = "layer", requires = "mixed")]
    pub within: Within,
    /// Do not round with error feedback, whatever the rows of --calibration are for besides
    #[arg(long)]
    pub nearest: bool,
    /// Factors on the input channels of experts, folded into norms, router, shared experts and up projections, by the
    /// rows of --calibration: `awq` (searched for the least damage of rounding), `eaquant` (the largest that any expert
    /// asks for), or JSON with parameters
    #[arg(long, value_name = "NAME|JSON", value_parser = smoothing)]
    pub smooth: Option<Smoothing>,
    /// Round routers to so many bits, clipped so that they choose the same experts on the rows of --calibration
    #[arg(long, value_name = "BITS")]
    pub router_bits: Option<u32>,
    /// Repeat rows of --calibration until every expert has this share of an even load, such as 0.5
    #[arg(long, value_name = "SHARE")]
    pub balance: Option<f64>,
    /// Which weights
    #[arg(long, default_value = "experts")]
    pub part: Part,
    /// Rows to calibrate on: experts are rounded with error feedback (GPTQ) by the second moments of their inputs,
    /// unless --nearest
    #[command(flatten)]
    pub data: cli::DataArguments,
    /// Memory to stay within while calibrating, such as 8GiB; never changes results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// New directory for the model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Go on with what an interrupted run left
    #[arg(long)]
    pub resume: bool,
    /// Replace an output that is there
    #[arg(long)]
    pub force: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Which weights are quantized.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Part {
    /// Routed experts
    Experts,
    /// Routed and shared experts, dense FFNs and attention
    Linear,
}

/// What gets one precision.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Within {
    /// The experts of a layer
    Layer,
    /// Every expert by itself
    Expert,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What quantization did.
    #[serde(flatten)]
    pub quantized: QuantizeReport,
    /// With several formats, which expert has which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation: Option<PrecisionAllocation>,
    /// What calibration found besides.
    pub calibration: QuantizeCalibration,
    /// The directory.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(PrecisionAllocation { bits, predicted, .. }) = &self.allocation {
            writeln!(f, "{bits:.2} bits per weight of experts; predicted divergence {predicted:.4} nats per token")?;
        }
        writeln!(f, "{}{}{}", self.calibration, self.quantized, self.out.display())
    }
}

/// What is best at a given size.
#[derive(Clone, Debug, Serialize)]
pub struct FrontierReport {
    /// The models that were measured.
    pub points: Vec<FrontierPoint>,
    /// The folder of the report.
    pub out: PathBuf,
}

impl fmt::Display for FrontierReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", frontier_table(&self.points).to_text())?;
        writeln!(f, "{}", equal_bytes_table(&self.points).to_text())?;
        writeln!(f, "{}", self.out.join("report.html").display())
    }
}

/// Measures what is best at a given size, and writes the report.
///
/// # Errors
/// No rows, an output that exists, parameters that do not fit the model: before the model is run.
pub fn run_frontier(arguments: &Arguments, progress: Progress) -> Result<FrontierReport> {
    let base = Arc::new(Checkpoint::open(&arguments.model)?);
    if arguments.data.data.is_empty() {
        return Err(Error::Usage("--frontier measures on rows: give some by --calibration".into()));
    }
    if arguments.out.exists() && !arguments.force {
        return Err(Error::Usage(format!("{} exists: give --force to replace its report", arguments.out.display())));
    }
    let mut options = FrontierOptions { ratios: arguments.ratios.clone(), ..FrontierOptions::default() };
    if !arguments.mixed.is_empty() {
        options.formats = arguments.mixed.clone();
    }
    options.check(&base)?;
    let (model, data) = rows(arguments, &base)?;
    let points = frontier(&model, &data, arguments.data.waves(), &options, progress)?;
    std::fs::create_dir_all(&arguments.out).map_err(Error::io(&arguments.out))?;
    let mut report = moe::report::Report::new("Bits, experts and units at equal bytes");
    report.frontier(&points)?;
    report.write(arguments.out.join("report.html"))?;
    moe_checkpoint::write_json(&arguments.out.join("frontier.json"), &serde_json::json!(points))?;
    Ok(FrontierReport { points, out: arguments.out.clone() })
}

fn smoothing(text: &str) -> std::result::Result<Smoothing, String> {
    text.parse().map_err(|error: moe_checkpoint::Error| error.to_string())
}

fn precision(text: &str) -> std::result::Result<BasePrecision, String> {
    text.parse().map_err(|error: moe_checkpoint::Error| error.to_string())
}

fn format(text: &str) -> std::result::Result<WeightFormat, String> {
    text.parse().map_err(|error: moe_checkpoint::Error| error.to_string())
}

/// Quantizes and writes.
///
/// # Errors
/// Parameters that do not fit the model, an output that exists: before anything is written.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<Report> {
    let base = Arc::new(Checkpoint::open(&arguments.model)?);
    let existing = match (arguments.force, arguments.resume) {
        (true, _) => Existing::Force,
        (_, true) => Existing::Resume,
        _ => Existing::Refuse,
    };
    let options = WriteOptions { existing, ..WriteOptions::default() };
    let mut store = arguments.out.clone().into_os_string();
    store.push(".work");
    let store = PathBuf::from(store);
    if arguments.resume {
        cli::end_removal(&store)?;
    }
    // A run that was killed after the model had its name leaves its work, which then only has to go.
    let ended = arguments.resume && store.exists() && arguments.out.exists();
    if !ended {
        check_output(&base, &arguments.out, &options)?;
    }
    let part = match arguments.part {
        Part::Experts => QuantizedPart::Experts,
        Part::Linear => QuantizedPart::Linear,
    };
    let first = arguments.mixed.first().map(|precision| precision.format(&base));
    let Some(format) = arguments.format.clone().or(first) else {
        return Err(Error::Usage("--format or --mixed".into()));
    };
    let how = QuantizeOptions { format, part };
    let routers = arguments.router_bits.map(|bits| RouterRounding { bits, ..RouterRounding::default() });
    let (smooth, balance) = (arguments.smooth, arguments.balance);
    let with = QuantizeWith { smooth, routers, balance, second_order: !arguments.nearest };
    let rows = match arguments.data.data.is_empty() {
        true => {
            let asked = [
                ("--mixed", !arguments.mixed.is_empty()),
                ("--smooth", with.smooth.is_some()),
                ("--router-bits", with.routers.is_some()),
                ("--balance", with.balance.is_some()),
            ];
            if let Some((name, _)) = asked.iter().find(|(_, asked)| *asked) {
                return Err(Error::Usage(format!("{name} measures on rows: give some by --calibration")));
            }
            None
        }
        false => {
            with.check(&base)?;
            if arguments.nearest && arguments.mixed.is_empty() && with.passes() == usize::from(with.balance.is_some()) {
                return Err(Error::Usage("--nearest leaves nothing for the rows of --calibration to do".into()));
            }
            Some(rows(arguments, &base)?)
        }
    };
    if arguments.force && store.exists() {
        cli::remove_work(&store)?;
    }
    let calibrated = rows.as_ref().map(|(model, data)| QuantizeRows {
        model,
        data,
        waves: arguments.data.waves(),
        store: &store,
        group: &Alone,
    });
    let made = match (calibrated, arguments.keep_bytes) {
        (Some(rows), Some(keep_bytes)) if !arguments.mixed.is_empty() => {
            let within = match arguments.within {
                Within::Layer => PrecisionGroup::Layer,
                Within::Expert => PrecisionGroup::Expert,
            };
            let mixed = MixedBits { formats: arguments.mixed.clone(), keep_bytes, within };
            quantize_mixed(&base, &how, &mixed, rows, &with, progress)?
        }
        (Some(rows), _) => quantize_calibrated(&base, &how, rows, &with, progress)?,
        (None, _) => QuantizedModel::from(Quantized::on(&base, &how)?),
    };
    let QuantizedModel { quantized, allocation, calibration } = made;
    let bar = progress.bar("writing", quantized.model().bytes_on_disk(), Unit::Bytes);
    let tell = |at: &moe_checkpoint::Progress<'_>| {
        bar.at(at.done);
        Ok(())
    };
    if !(ended && cli::is_written(quantized.model(), &arguments.out)) {
        write(quantized.model(), &arguments.out, &WriteOptions { progress: Some(&tell), ..options })?;
    }
    if store.exists() {
        cli::remove_work(&store)?;
    }
    Ok(Report { quantized: quantized.report().clone(), allocation, calibration, out: arguments.out.clone() })
}

/// The model to be run, and the rows to calibrate on.
fn rows(arguments: &Arguments, base: &Arc<Checkpoint>) -> Result<(Model, Dataset)> {
    let device = moe_core::device::device(&arguments.device)?;
    let model = Model::new(base.clone(), &device, arguments.max_memory)?;
    let tokenizer = match arguments.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&arguments.model)?),
        false => None,
    };
    let data = arguments.data.load(tokenizer.as_ref(), model.config().vocab_size)?;
    Ok((model, data))
}

#[cfg(test)]
mod tests;
