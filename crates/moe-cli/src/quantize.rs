//! Quantization of a checkpoint.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use moe::jobs::{QuantizeRows, quantize, quantize_mixed};
use moe::recipe::MixedBits;
use moe_checkpoint::{
    BasePrecision, Checkpoint, Existing, QuantizeOptions, QuantizeReport, QuantizedPart, WeightFormat, WriteOptions,
    check_output, write,
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
moe quantize --model DIR --mixed int4,int8 --keep-bytes 20GiB --calibration rows.jsonl --samples 64 --out OUT"
)]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The format: a name, or JSON with its parameters
    #[arg(long, value_name = "NAME|JSON", value_parser = format, required_unless_present = "mixed")]
    pub format: Option<WeightFormat>,
    /// Several precisions, separated by commas, of which every layer gets the one that changes the model least within
    /// --keep-bytes, measured on the rows of --calibration: int4, int6, int8, fp8, mxfp4, nvfp4
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = precision, requires = "keep_bytes")]
    pub mixed: Vec<BasePrecision>,
    /// With --mixed, bytes of the whole model at most, such as 8GiB
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes, requires = "mixed")]
    pub keep_bytes: Option<u64>,
    /// With --mixed, what gets one precision: the experts of a layer, or every expert by itself
    #[arg(long, value_name = "GROUP", default_value = "layer", requires = "mixed")]
    pub within: Within,
    /// With --mixed, do not round with error feedback
    #[arg(long, requires = "mixed")]
    pub nearest: bool,
    /// Which weights
    #[arg(long, default_value = "experts")]
    pub part: Part,
    /// Rows to calibrate on: experts are rounded with error feedback (GPTQ) by the second moments of their inputs
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
    /// The directory.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(PrecisionAllocation { bits, predicted, .. }) = &self.allocation {
            writeln!(f, "{bits:.2} bits per weight of experts; predicted divergence {predicted:.4} nats per token")?;
        }
        writeln!(f, "{}{}", self.quantized, self.out.display())
    }
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
    if !arguments.mixed.is_empty() && arguments.data.data.is_empty() {
        return Err(Error::Usage("--mixed measures on rows: give some by --calibration".into()));
    }
    let rows = match arguments.data.data.is_empty() {
        true => None,
        false => Some(rows(arguments, &base)?),
    };
    if arguments.force && store.exists() {
        std::fs::remove_dir_all(&store).map_err(Error::io(&store))?;
    }
    let calibrated =
        rows.as_ref().map(|(model, data)| QuantizeRows { model, data, waves: arguments.data.waves(), store: &store });
    let (quantized, allocation) = match (calibrated, arguments.keep_bytes) {
        (Some(rows), Some(keep_bytes)) if !arguments.mixed.is_empty() => {
            let within = match arguments.within {
                Within::Layer => PrecisionGroup::Layer,
                Within::Expert => PrecisionGroup::Expert,
            };
            let mixed = MixedBits { formats: arguments.mixed.clone(), keep_bytes, within };
            let (quantized, allocation) = quantize_mixed(&base, &how, &mixed, rows, !arguments.nearest, progress)?;
            (quantized, Some(allocation))
        }
        (calibrated, _) => (quantize(&base, &how, calibrated, progress)?, None),
    };
    let bar = progress.bar("writing", quantized.model().bytes_on_disk(), Unit::Bytes);
    let tell = |at: &moe_checkpoint::Progress<'_>| {
        bar.at(at.done);
        Ok(())
    };
    if !(ended && cli::is_written(quantized.model(), &arguments.out)) {
        write(quantized.model(), &arguments.out, &WriteOptions { progress: Some(&tell), ..options })?;
    }
    if store.exists() {
        std::fs::remove_dir_all(&store).map_err(Error::io(&store))?;
    }
    Ok(Report { quantized: quantized.report().clone(), allocation, out: arguments.out.clone() })
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
mod tests {
    use super::*;

    #[test]
    fn calibration_changes_the_codes_and_not_the_layout() {
        let dir = tempfile::tempdir().unwrap();
        let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
        let format = r#"{"type": "int", "bits": 4, "group_size": 32}"#;
        let written = |name: &str, more: &[&str]| {
            let out = dir.path().join(name).display().to_string();
            let plain = ["quantize", "--model", crate::TINY_MOE, "--format", format, "--out", &out];
            run(&Arguments::try_parse_from([&plain[..], more].concat()).unwrap(), Progress::hidden()).unwrap();
            Checkpoint::open(out).unwrap()
        };
        let nearest = written("nearest", &[]);
        let calibrated = written("calibrated", &["--calibration", &rows, "--samples", "8"]);
        assert!(nearest.tensors().map(|info| info.spec()).eq(calibrated.tensors().map(|info| info.spec())));
        let codes = |model: &Checkpoint| {
            let packed = model.tensors().filter(|info| info.name.ends_with("weight_packed"));
            packed.map(|info| model.bytes(&info.name).unwrap().into_owned()).collect::<Vec<_>>()
        };
        assert!(codes(&nearest) != codes(&calibrated));
        assert_eq!(calibrated.steps().len(), 1);
        assert!(calibrated.steps()[0].recipe["calibration"].is_string());
    }

    #[test]
    fn several_precisions_share_out_the_bytes_that_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
        let out = dir.path().join("mixed").display().to_string();
        let plain = ["quantize", "--model", crate::TINY_MOE, "--mixed", "int4,int8", "--out", &out];
        let with = |more: &[&str]| Arguments::try_parse_from([&plain[..], more].concat());
        assert!(with(&[]).is_err(), "a budget is needed");
        let no_rows = run(&with(&["--keep-bytes", "3800KB"]).unwrap(), Progress::hidden()).unwrap_err();
        assert!(no_rows.to_string().contains("--calibration"), "{no_rows}");
        let arguments = with(&["--keep-bytes", "3800KB", "--calibration", &rows, "--samples", "4"]).unwrap();
        let report = run(&arguments, Progress::hidden()).unwrap();
        let allocation = report.allocation.clone().unwrap();
        assert!(allocation.bytes <= 3_800_000 && allocation.bits > 4.5 && allocation.bits < 8.5, "{report}");
        let written = Checkpoint::open(&out).unwrap();
        assert_eq!(written.bytes_on_disk(), allocation.bytes);
        let groups = written.raw_config()["quantization_config"]["config_groups"].as_object().unwrap().len();
        assert_eq!(groups, 2, "{report}");
    }

    #[test]
    fn the_bundled_model_is_quantized_and_opens_again() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("int4");
        let json = r#"{"type": "int", "bits": 4, "group_size": 32}"#;
        let arguments = |out: &PathBuf, format: &str| {
            let out = out.display().to_string();
            Arguments::try_parse_from(["quantize", "--model", crate::TINY_MOE, "--format", format, "--out", &out])
        };
        let report = run(&arguments(&out, json).unwrap(), Progress::hidden()).unwrap();
        let text = report.to_string();
        assert!(text.contains("int4 in groups of 32") && text.contains("times smaller"), "{text}");
        let written = Checkpoint::open(&out).unwrap();
        assert!(written.quantization().is_some());
        assert_eq!(written.bytes_on_disk(), report.quantized.bytes.after);
        assert!(report.quantized.bytes.after * 2 < report.quantized.bytes.before);
        let again = run(&arguments(&out, json).unwrap(), Progress::hidden()).unwrap_err().to_string();
        assert!(again.contains("exists"), "{again}");
        let wrong = run(&arguments(&dir.path().join("b"), "fp8_blocks").unwrap(), Progress::hidden()).unwrap_err();
        assert!(wrong.to_string().contains("96 rows"), "{wrong}");
        assert!(arguments(&out, "int7").unwrap_err().to_string().contains("fp8_channels"));
    }
}
