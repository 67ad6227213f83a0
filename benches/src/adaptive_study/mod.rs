//! Quality of a trained model under fewer experts, fewer layers and other ways of decoding, without other weights:
//! against the experts per token, the layers that run, and the time.

mod budget;
mod draw;
mod duo;
mod settings;
mod trained;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use draw::Draw;
use moe::eval_file::EvalFile;
use moe_core::Model;
use moe_core::adaptive::RunTime;
use moe_core::data::{Tokenizer, Wave, WaveOptions};
use moe_core::decode::{Decoding, DecodingConfig, DecodingReport};
use serde_json::{Value, json};
use settings::{Setting, Way, settings};

use crate::{Error, Result};

/// Measures the bundled model under rules of routing, paths of layers and ways of decoding
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// File for the tables
    #[arg(long, value_name = "FILE", default_value = "out/adaptive-study.md")]
    pub out: PathBuf,
    /// Draws of calibration and evaluation rows
    #[arg(long, default_value_t = 3)]
    pub draws: usize,
    /// Rows of each evaluation file per draw
    #[arg(long, default_value_t = 60)]
    pub rows: usize,
    /// Model directory
    #[arg(long, value_name = "DIR", default_value = crate::TINY_MOE)]
    pub model: PathBuf,
    /// Folder of the rows; by default the model's own, `data`, or that of the bundled tiny-moe
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// What the tables of another model are called: `adaptive-NAME-routing` and so on
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Tables to make; all, if none is named
    #[arg(long = "table", value_name = "NAME", value_parser = TABLES)]
    pub tables: Vec<String>,
}

/// What can be made.
const TABLES: [&str; 6] = ["routing", "depth", "trained", "decoding", "duo", "budget"];

impl Arguments {
    /// Whether a table is made.
    fn wants(&self, table: &str) -> bool {
        self.tables.is_empty() || self.tables.iter().any(|name| name == table)
    }

    /// Folder of the rows.
    fn data(&self) -> PathBuf {
        let own = self.model.join("data");
        match &self.data {
            Some(data) => data.clone(),
            None if own.is_dir() => own,
            None => Path::new(crate::TINY_MOE).join("data"),
        }
    }
}

/// One measurement of a setting.
#[derive(Clone, Debug, Default)]
struct Measured {
    quality: Vec<f64>,
    experts: f64,
    layers: f64,
    seconds: f64,
    acceptance: Option<f64>,
    /// Share of the layers of a model against itself that ran once.
    shared: Option<f64>,
}

fn under(model: &Model, options: &Value, waves: &[Wave]) -> Result<Model> {
    let run_time: RunTime =
        serde_json::from_value(options.clone()).map_err(|error| Error::Invalid(format!("{options}: {error}")))?;
    let run_time = run_time.calibrated(model, waves)?;
    let again = Model::new(model.checkpoint().clone(), model.device(), model.max_memory())?;
    Ok(run_time.on(&again)?.unwrap_or(again))
}

fn measure(setting: &Setting, model: &Model, tokenizer: &Tokenizer, draw: &Draw) -> Result<Measured> {
    let mut measured = Measured::default();
    let (mut decoding, mut others) = (DecodingConfig::Plain, Vec::new());
    let model = match &setting.way {
        Way::RunTime(options) => under(model, options, &draw.waves)?,
        Way::Answers(options) => under(model, options, &draw.answers)?,
        Way::Steer(lambda) => under(model, &trained::steering(model, draw, *lambda)?, &draw.waves)?,
        Way::Train(method) => trained::by(method, model, draw)?,
        Way::Drop(rule) => {
            let seen = rule.measure(model, &draw.waves)?;
            let layers = rule.layers(model.config().layers.len(), seen.as_deref())?;
            let left = moe_checkpoint::LayerDrop::new(layers).on(model.checkpoint())?;
            Model::new(left, model.device(), model.max_memory())?
        }
        Way::Decode { config, others: of } => {
            decoding =
                serde_json::from_value(config.clone()).map_err(|error| Error::Invalid(format!("{config}: {error}")))?;
            decoding = decoding.calibrated(model, &draw.answers)?;
            for options in of {
                others.push(under(model, options, &draw.waves)?);
            }
            under(model, &json!({}), &draw.waves)?
        }
    };
    let decoding = Decoding::new(decoding, &model, others.iter().collect())?;
    let mut did = DecodingReport::default();
    for file in &draw.files {
        let start = Instant::now();
        let (value, _, report) = file.measure_with(&model, tokenizer, WaveOptions::default(), &decoding)?;
        measured.seconds += start.elapsed().as_secs_f64();
        measured.quality.push(value);
        did.add(&report);
    }
    let work = model.work();
    (measured.experts, measured.layers) = (work.experts_per_token(), work.layers_per_token());
    (measured.acceptance, measured.shared) = (did.acceptance(), did.shared());
    Ok(measured)
}

/// What a model cannot do, where that is the error.
fn unsupported(error: &Error) -> Option<&str> {
    match error {
        Error::Run(moe_core::Error::Unsupported(what)) => Some(what),
        Error::Peft(error) => match &**error {
            moe_peft::Error::Unsupported(what) => Some(what),
            _ => None,
        },
        _ => None,
    }
}

/// Mean and standard deviation.
fn shown(values: impl Iterator<Item = f64> + Clone) -> String {
    let n = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let spread = (values.map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    format!("{mean:.3} ± {spread:.3}")
}

/// Measures everything, writes the tables, and gives them.
///
/// # Errors
/// Whatever keeps the model from being opened or run.
pub fn run(arguments: &Arguments) -> Result<String> {
    let device = moe_core::device::device("default")?;
    let model = Model::open(&arguments.model, &device, None)?;
    let tokenizer = Tokenizer::from_dir(&arguments.model)?;
    let scratch = tempfile::tempdir().map_err(Error::io(Path::new("a temporary directory")))?;
    let mut draws = Vec::new();
    for number in 0..arguments.draws.max(1) {
        let dir = scratch.path().join(number.to_string());
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        draws.push(Draw::new(number, arguments, &model, &tokenizer, &dir)?);
    }
    let all = settings(model.router().top_k(), model.config().layers.len());
    let mut tables = String::new();
    let named = arguments.name.as_ref().map_or(String::new(), |name| format!("{name}-"));
    for table in TABLES.into_iter().take(4).filter(|table| arguments.wants(table)) {
        let keys: Vec<String> = draws[0].files.iter().map(EvalFile::key).collect();
        tables += &format!(
            "<!-- study:adaptive-{named}{table} -->\n\n| | {} | experts per token | layers | seconds |",
            keys.join(" | ")
        );
        tables += if table == "decoding" { " accepted | layers shared |\n" } else { "\n" };
        tables += &format!("|---|{}--:|--:|--:|", "--:|".repeat(keys.len()));
        tables += if table == "decoding" { "--:|--:|\n" } else { "\n" };
        let mut refused = Vec::new();
        for setting in all.iter().filter(|setting| setting.table == table) {
            let start = Instant::now();
            let found = draws.iter().map(|draw| measure(setting, &model, &tokenizer, draw)).collect::<Result<Vec<_>>>();
            eprintln!("{table}: {} took {:.1} s", setting.name, start.elapsed().as_secs_f64());
            if let Some(what) = found.as_ref().err().and_then(unsupported) {
                refused.push(format!("{} is refused: {what}.", setting.name));
                continue;
            }
            let found = found?;
            let quality = (0..keys.len()).map(|i| shown(found.iter().map(move |m| m.quality[i])));
            let quality: Vec<String> = quality.collect();
            let experts = found.iter().map(|m| m.experts).sum::<f64>() / found.len() as f64;
            let layers = found.iter().map(|m| m.layers).sum::<f64>() / found.len() as f64;
            let seconds = found.iter().map(|m| m.seconds).sum::<f64>() / found.len() as f64;
            tables +=
                &format!("| {} | {} | {experts:.2} | {layers:.2} | {seconds:.2} |", setting.name, quality.join(" | "),);
            if table == "decoding" {
                for of in [|m: &Measured| m.acceptance, |m: &Measured| m.shared] {
                    let shares: Vec<f64> = found.iter().filter_map(of).collect();
                    let cell = if shares.is_empty() { String::new() } else { shown(shares.iter().copied()) };
                    tables += &format!(" {cell} |");
                }
            }
            tables.push('\n');
        }
        refused.iter().for_each(|what| tables += &format!("\n{what}\n"));
        tables += &format!("\n<!-- /study:adaptive-{named}{table} -->\n\n");
    }
    if arguments.wants("duo") {
        tables += &duo::table(&named, &model, &draws)?;
    }
    if arguments.wants("budget") {
        tables += &budget::table(&named, &model, &draws)?;
    }
    if let Some(parent) = arguments.out.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    std::fs::write(&arguments.out, &tables).map_err(Error::io(&arguments.out))?;
    Ok(tables)
}
