//! Quantization of a checkpoint.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use moe::jobs::{QuantizeRows, quantize};
use moe_checkpoint::{
    Checkpoint, Existing, QuantizeOptions, QuantizeReport, QuantizedPart, WeightFormat, WriteOptions, check_output,
    write,
};
use moe_core::Model;
use moe_core::data::{Dataset, Tokenizer};
use serde::Serialize;

use crate::progress::{Progress, Unit};
use crate::{Error, Result, cli};

/// Rounds the weights of a model to few bits, in the files that engines serve
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Formats: fp8_blocks (DeepSeek), fp8_channels, int4 and int8 in groups of 128, nvfp4 (compressed-tensors), mxfp4 (gpt-oss in its own \
layout)\n\nExamples:\n  moe quantize --model Qwen3-30B-A3B --format int4 --out Qwen3-int4\n  \
moe quantize --model DIR --format '{\"type\": \"int\", \"bits\": 4, \"group_size\": 32}' --part linear --out OUT --json\n  \
moe quantize --model DIR --format int4 --calibration rows.jsonl --samples 64 --out OUT"
)]
pub struct Arguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The format: a name, or JSON with its parameters
    #[arg(long, value_name = "NAME|JSON", value_parser = format)]
    pub format: WeightFormat,
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

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What quantization did.
    #[serde(flatten)]
    pub quantized: QuantizeReport,
    /// The directory.
    pub out: PathBuf,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}{}", self.quantized, self.out.display())
    }
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
    check_output(&base, &arguments.out, &options)?;
    let part = match arguments.part {
        Part::Experts => QuantizedPart::Experts,
        Part::Linear => QuantizedPart::Linear,
    };
    let how = QuantizeOptions { format: arguments.format.clone(), part };
    let rows = match arguments.data.data.is_empty() {
        true => None,
        false => Some(rows(arguments, &base)?),
    };
    let mut store = arguments.out.clone().into_os_string();
    store.push(".work");
    let store = PathBuf::from(store);
    if arguments.force && store.exists() {
        std::fs::remove_dir_all(&store).map_err(Error::io(&store))?;
    }
    let calibrated =
        rows.as_ref().map(|(model, data)| QuantizeRows { model, data, waves: arguments.data.waves(), store: &store });
    let quantized = quantize(&base, &how, calibrated, progress)?;
    let bar = progress.bar("writing", quantized.model().bytes_on_disk(), Unit::Bytes);
    let tell = |at: &moe_checkpoint::Progress<'_>| {
        bar.at(at.done);
        Ok(())
    };
    write(quantized.model(), &arguments.out, &WriteOptions { progress: Some(&tell), ..options })?;
    if store.exists() {
        std::fs::remove_dir_all(&store).map_err(Error::io(&store))?;
    }
    Ok(Report { quantized: quantized.report().clone(), out: arguments.out.clone() })
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
