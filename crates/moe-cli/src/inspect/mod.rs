//! What a file or folder is and what may be done with it.

mod artifacts;
mod checkpoint;

use std::fmt;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Parser;
use moe_checkpoint::{Checkpoint, StatisticsStore};
use moe_core::data::{Dataset, DatasetOptions, LossOver, Preview, Tokenizer};
use serde_json::{Map, Value, json};

use crate::{Error, Result, cli};

/// Tells what a file or folder is and what may be done with it
///
/// Knows checkpoints (plain, ragged, grouped, pruned, merged), scores, statistics, evidence, plans of pruning and
/// merging, edits, curves, rankings, protection masks, adapters, mixtures, condensers, compressed experts, deltas,
/// compact experts, recipes, and rows of data, of which it shows the first three as tokens, with what counts in the
/// loss in green. Reads headers, not weights.
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Examples:\n  moe inspect models/Qwen1.5-MoE-A2.7B\n  moe inspect rows.jsonl --model models/Qwen1.5-MoE-A2.7B --loss answers"
)]
pub struct Arguments {
    /// A model directory, or a file or folder that a verb wrote, or rows of data: a file or a folder of them
    pub path: PathBuf,
    /// Tokenizer of this model directory, for rows of data that hold text
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Of rows of data, which tokens count in the loss: all of a row, or those of its answer alone
    #[arg(long, value_name = "all|answers", default_value = "all", value_parser = cli::loss)]
    pub loss: LossOver,
    /// With --loss answers, do not end completions with the end-of-sequence token, as moe tune does not with it either
    #[arg(long)]
    pub no_eos: bool,
    /// Rows of data that are shown
    #[arg(long, default_value_t = 3)]
    pub rows: usize,
    /// How rows are read
    #[command(flatten)]
    pub reading: cli::RowArguments,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Names and values, in order.
#[derive(Clone, Debug)]
pub struct Facts {
    fields: Map<String, Value>,
    /// What stands below them.
    text: String,
}

impl Facts {
    /// As JSON.
    pub fn json(&self) -> Value {
        Value::Object(self.fields.clone())
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.fields {
            match value {
                Value::String(text) => writeln!(f, "{name:<18} {text}")?,
                Value::Array(lines) => {
                    for (index, line) in lines.iter().enumerate() {
                        let name = if index == 0 { name } else { "" };
                        match line.as_str() {
                            Some(line) => writeln!(f, "{name:<18} {line}")?,
                            None => writeln!(f, "{name:<18} {line}")?,
                        }
                    }
                }
                value => match value.as_u64() {
                    Some(bytes) if name.starts_with("bytes") => {
                        writeln!(f, "{name:<18} {}", crate::format::size(bytes))?;
                    }
                    Some(number) if number >= 10_000 => writeln!(f, "{name:<18} {}", crate::format::count(number))?,
                    _ => writeln!(f, "{name:<18} {value}")?,
                },
            }
        }
        match self.text.is_empty() {
            true => Ok(()),
            false => write!(f, "\n{}", self.text),
        }
    }
}

/// Looks at what the arguments name.
///
/// # Errors
/// What cannot be read, and what is nothing that these crates know.
pub fn run(arguments: &Arguments) -> Result<Facts> {
    let path = &arguments.path;
    let (facts, text) = match path.is_dir() {
        true if is_folder_of_data(path)? => rows(arguments)?,
        true => (folder(path)?, String::new()),
        false if is_data(path)? => rows(arguments)?,
        false => (artifacts::file(path)?, String::new()),
    };
    match facts {
        Value::Object(fields) => Ok(Facts { fields, text }),
        other => Err(Error::Invalid(format!("{}: {other}", path.display()))),
    }
}

fn folder(path: &Path) -> Result<Value> {
    if StatisticsStore::exists(path) {
        return artifacts::statistics_store(path);
    }
    // What moe score writes has its statistics within.
    if !path.join("config.json").exists() && StatisticsStore::exists(path.join("statistics")) {
        return artifacts::statistics_store(&path.join("statistics"));
    }
    if path.join(moe_merge::COMPACT_FILE).exists() {
        return artifacts::compact(path);
    }
    if moe_checkpoint::is_flat_ragged(path) {
        let mut facts = checkpoint::facts(&moe_checkpoint::open_flat_ragged(path)?)?;
        facts["kind"] = json!(
            "checkpoint with experts of different widths, as the vLLM plugin of Less-is-MoE reads it (flat ragged)"
        );
        facts["operations"] = json!(["moe convert DIR --to ragged --out DIR makes one that the other verbs open"]);
        return Ok(facts);
    }
    let tuned = moe_peft::open(path).ok();
    match tuned {
        Some(saved) if !path.join("config.json").exists() => artifacts::tuned(path, &saved),
        saved => {
            let opened = Checkpoint::open(path).map_err(|error| named(path, error))?;
            let mut facts = checkpoint::facts(&opened)?;
            if let Some(saved) = saved {
                let kinds: Vec<String> = saved.kinds().iter().map(ToString::to_string).collect();
                facts["beside the weights"] = json!(kinds.join(", "));
            }
            Ok(facts)
        }
    }
}

/// The error of a model that does not open, with what its config says that it is, where the error does not.
fn named(path: &Path, error: moe_checkpoint::Error) -> Error {
    let config = std::fs::read(path.join("config.json")).ok();
    let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let model_type = config.as_ref().and_then(|config| config["model_type"].as_str());
    match model_type.filter(|model_type| !error.to_string().contains(&format!("`{model_type}`"))) {
        Some(model_type) => Error::Invalid(format!("{error} (the config is of a `{model_type}`)")),
        None => error.into(),
    }
}

/// Whether a file is rows of data rather than an artifact, by its name, and by what is in it where the name leaves that
/// open.
fn is_data(path: &Path) -> Result<bool> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    Ok(match extension {
        "gz" | "txt" | "parquet" | "ndjson" => true,
        "jsonl" => artifacts::first_line(path)?.get("experts").is_none(),
        "json" => {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let first = text.trim_start_matches('\u{feff}').trim_start().strip_prefix('[').map(str::trim_start);
            // A mask is a list, too: of experts.
            first.is_some() && serde_json::from_str::<moe_checkpoint::ProtectionMask>(&text).is_err()
        }
        _ => false,
    })
}

/// Whether a folder is one of rows of data: neither a model nor what a verb wrote, and with files that are nothing
/// else.
fn is_folder_of_data(path: &Path) -> Result<bool> {
    let artifact = path.join("config.json").exists() || StatisticsStore::exists(path);
    if artifact || moe_peft::open(path).is_ok() {
        return Ok(false);
    }
    let mut any = false;
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let file = entry.map_err(Error::io(path))?.path();
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if file.is_dir() || extension == "safetensors" {
            return Ok(false);
        }
        any |= matches!(extension, "gz" | "parquet" | "ndjson" | "jsonl") && is_data(&file)?;
    }
    Ok(any)
}

/// Rows of data, and the first of them as tokens.
fn rows(arguments: &Arguments) -> Result<(Value, String)> {
    let path = &arguments.path;
    let tokenizer = arguments.model.as_ref().map(Tokenizer::from_dir).transpose()?;
    let options = DatasetOptions {
        samples: None,
        loss: arguments.loss,
        // As they are trained on.
        end_completions: arguments.loss == LossOver::Completions && !arguments.no_eos,
        reading: arguments.reading.reading(),
        ..DatasetOptions::default()
    };
    let vocabulary = u32::MAX as usize;
    let data = Dataset::load(path, tokenizer.as_ref(), vocabulary, &options)?;
    cli::left_out(path, &data);
    let preview = Preview::load(path, tokenizer.as_ref(), vocabulary, &options, arguments.rows)?;
    let shown: Vec<Value> = preview
        .rows
        .iter()
        .map(|row| {
            let ids: Vec<u32> = row.tokens.iter().map(|token| token.id).collect();
            let counts: Vec<bool> = row.tokens.iter().map(|token| token.counts).collect();
            json!({ "line": row.place.line, "form": row.form, "ids": ids, "counts": counts, "cut": row.cut })
        })
        .collect();
    let mut facts = json!({
        "kind": "rows of data",
        "rows": data.sequences.len(),
        "dropped": data.dropped,
        "skipped": data.skipped,
        "tokens": data.tokens(),
        "count in the loss": data.loss_tokens(),
        "longest": data.longest(),
        "operations": ["moe score --model DIR --data FILE …", "moe tune --model DIR --data FILE …"],
    });
    if arguments.json {
        facts["first rows"] = json!(shown);
    }
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    Ok((facts, preview.to_text(color)))
}
