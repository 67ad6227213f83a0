//! What a file or folder is and what may be done with it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use moe_checkpoint::{
    AttentionKind, Checkpoint, ExpertLayout, Ffn, Mixer, ModelConfig, Record, SafetensorsFile, ScoreTable,
    StatisticsStore,
};
use moe_core::data::{Dataset, DatasetOptions, Tokenizer};
use moe_peft::codec::{Delta, DeltaBase};
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// Tells what a file or folder is and what may be done with it
///
/// Knows checkpoints, scores, statistics, plans of pruning and merging, adapters, deltas and rows of data. Reads headers, not weights.
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Example: moe inspect models/Qwen1.5-MoE-A2.7B")]
pub struct Arguments {
    /// A model directory, or a file or folder that a verb wrote
    pub path: PathBuf,
    /// Tokenizer of this model directory, for rows of data that hold text
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Names and values, in order.
#[derive(Clone, Debug)]
pub struct Facts(Map<String, Value>);

impl Facts {
    /// As JSON.
    pub fn json(&self) -> Value {
        Value::Object(self.0.clone())
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.0 {
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
                value => writeln!(f, "{name:<18} {value}")?,
            }
        }
        Ok(())
    }
}

/// Looks at what the arguments name.
///
/// # Errors
/// What cannot be read, and what is nothing that these crates know.
pub fn run(arguments: &Arguments) -> Result<Facts> {
    let path = &arguments.path;
    let facts = match path.is_dir() {
        true => folder(path)?,
        false => file(path, arguments.model.as_deref())?,
    };
    match facts {
        Value::Object(map) => Ok(Facts(map)),
        other => Err(Error::Invalid(format!("{}: {other}", path.display()))),
    }
}

fn folder(path: &Path) -> Result<Value> {
    let has = |name: &str| path.join(name).exists();
    if has("adapter_config.json") {
        return adapter(path);
    }
    if has("manifest.json") && !has("config.json") {
        let store = StatisticsStore::open(path)?;
        let provenance = store.provenance();
        return Ok(json!({
            "kind": "statistics",
            "waves": store.waves().len(),
            "model": provenance.model,
            "data": provenance.data,
            "recipe": provenance.recipe,
            "operations": ["score without running the model: moe score --statistics DIR --scorer NAME"],
        }));
    }
    facts(&Checkpoint::open(path)?)
}

fn adapter(path: &Path) -> Result<Value> {
    let config = json_file(&path.join("adapter_config.json"))?;
    let field = |name: &str| config.get(name).cloned().unwrap_or(Value::Null);
    let weights = SafetensorsFile::open(path.join("adapter_model.safetensors"))?;
    let parameters: u64 =
        weights.tensors().map(|tensor| tensor.shape.iter().map(|size| *size as u64).product::<u64>()).sum();
    Ok(json!({
        "kind": "adapter",
        "type": field("peft_type"),
        "rank": field("r"),
        "alpha": field("lora_alpha"),
        "modules": field("target_modules"),
        "parameter tensors": field("target_parameters"),
        "base": field("base_model_name_or_path"),
        "tensors": weights.tensors().count(),
        "parameters": parameters,
        "operations": ["moe eval --model DIR --adapter DIR", "moe adapter merge --model DIR --adapter DIR --out DIR"],
    }))
}

fn file(path: &Path, model: Option<&Path>) -> Result<Value> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension {
        "safetensors" => tensors(path),
        "json" if !rows_of_data(path)? => plan(path),
        "jsonl" | "json" | "gz" | "txt" | "parquet" => rows(path, model),
        _ => match Delta::open(path) {
            Ok(delta) => Ok(delta_facts(&delta)),
            Err(_) => Err(Error::Invalid(format!(
                "{}: neither a model directory, nor scores, statistics, a plan, an adapter, a delta or rows of data",
                path.display()
            ))),
        },
    }
}

fn tensors(path: &Path) -> Result<Value> {
    if let Ok(table) = ScoreTable::load(path) {
        return Ok(json!({
            "kind": "scores",
            "scorer": table.scorer,
            "granularity": format!("{:?}", table.granularity),
            "compared within": format!("{:?}", table.pool),
            "layers": table.layers.len(),
            "model": table.provenance.model,
            "data": table.provenance.data,
            "recipe": table.provenance.recipe,
            "operations": ["moe prune --model DIR --scores FILE --ratio 0.5 --out DIR"],
        }));
    }
    if let Ok(delta) = Delta::open(path) {
        return Ok(delta_facts(&delta));
    }
    let file = SafetensorsFile::open(path)?;
    Ok(json!({ "kind": "tensors", "tensors": file.tensors().count() }))
}

fn delta_facts(delta: &Delta) -> Value {
    let table = delta.table();
    let base = match &table.base {
        DeltaBase::Checkpoint { fingerprint } => format!("checkpoint {fingerprint}"),
        DeltaBase::Adapter { .. } => "none: it is an adapter by itself".to_string(),
    };
    json!({
        "kind": "delta",
        "base": base,
        "coding": format!("{:?}", table.coding),
        "tensors": table.tensors.len(),
        "operations": ["moe delta apply FILE --base DIR --out DIR"],
    })
}

/// Whether a `.json` file is a list of rows rather than a plan.
fn rows_of_data(path: &Path) -> Result<bool> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    Ok(text.trim_start_matches('\u{feff}').trim_start().starts_with('['))
}

fn json_file(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
}

fn plan(path: &Path) -> Result<Value> {
    let value = json_file(path)?;
    if value.get("kept").is_some() {
        let plan = moe_prune::PrunePlan::load(path)?;
        let removed: usize = plan.kept.iter().map(|layer| layer.removed.len()).sum();
        return Ok(json!({
            "kind": "plan of pruning",
            "model": plan.model,
            "units kept": format!("{} of {}", plan.units_kept(), plan.shape.units()),
            "experts removed": removed,
            "ratio": format!("{:.4} asked, {:.4} achieved", plan.ratio.asked, plan.ratio.achieved),
            "never routed": plan.never_routed.len(),
            "recipe": plan.recipe,
            "operations": ["moe apply --model DIR --plan FILE --out DIR"],
        }));
    }
    if value.pointer("/layers/0/groups").is_some() {
        let plan = moe_merge::MergePlan::load(path)?;
        let groups: usize = plan.layers.iter().map(|layer| layer.groups.len()).sum();
        let experts: usize = plan.shape.layers.iter().map(|layer| layer.num_experts()).sum();
        return Ok(json!({
            "kind": "plan of merging",
            "model": plan.model,
            "recipe": plan.recipe.name,
            "experts": format!("{experts} become {groups}"),
            "operations": ["moe apply --model DIR --plan FILE --out DIR"],
        }));
    }
    if value.get("steps").is_some() {
        let record: Record = serde_json::from_value(value)
            .map_err(|error| Error::Invalid(format!("{}: neither a record nor a recipe: {error}", path.display())))?;
        let steps: Vec<String> = record.steps.iter().map(|step| format!("{}: {}", step.method, step.summary)).collect();
        return Ok(json!({ "kind": "record of a model", "steps": steps }));
    }
    Err(Error::Invalid(format!("{}: JSON, but neither a plan nor a record nor rows of data", path.display())))
}

fn rows(path: &Path, model: Option<&Path>) -> Result<Value> {
    let tokenizer = model.map(Tokenizer::from_dir).transpose()?;
    let data = Dataset::load(path, tokenizer.as_ref(), usize::MAX, &DatasetOptions::default())?;
    Ok(json!({
        "kind": "rows of data",
        "rows": data.sequences.len(),
        "dropped": data.dropped,
        "tokens": data.tokens(),
        "longest": data.longest(),
        "operations": ["moe score --calibration FILE …", "moe tune --data FILE …"],
    }))
}

fn facts(checkpoint: &Checkpoint) -> Result<Value> {
    let (config, shape) = (checkpoint.config(), checkpoint.shape());
    let counts: Vec<usize> = shape.layers.iter().map(|layer| layer.num_experts()).collect();
    let widths: Vec<usize> = shape.layers.iter().flat_map(|layer| layer.widths.iter().copied()).collect();
    let layouts: Vec<ExpertLayout> = shape
        .layers
        .iter()
        .map(|layer| checkpoint.expert_layout(layer.layer))
        .collect::<moe_checkpoint::Result<_>>()?;
    let dense = config.layers.len() - shape.layers.len();
    let (total, routed) = (checkpoint.parameters(), shape.parameters() + biases(config));
    let mtp: u64 = checkpoint.mtp_tensors().map(|tensor| tensor.elements()).sum();
    let made: Vec<String> =
        checkpoint.steps().iter().map(|step| format!("{}: {}", step.method, step.summary)).collect();
    let kind = match (checkpoint.grouped(), checkpoint.ragged()) {
        (true, _) => "checkpoint whose experts share sets of weights (grouped)",
        (_, true) => "checkpoint with experts of different widths (ragged)",
        _ => "checkpoint",
    };
    Ok(json!({
        "kind": kind,
        "made by": if made.is_empty() { json!("as released") } else { json!(made) },
        "family": config.model_type,
        "layers": format!("{} ({} MoE, {dense} dense)", config.layers.len(), shape.layers.len()),
        "hidden size": config.hidden_size,
        "attention": attention(config),
        "routed experts": format!("{} per MoE layer, {} per token", range(&counts), shape.top_k),
        "expert width": range(&widths),
        "expert layout": format!("{:?}{}", layouts[0], if layouts.iter().all(|l| *l == layouts[0]) { "" } else { ", mixed" }),
        "shared experts": shared(config),
        "routing": routing(config),
        "quantization": checkpoint.quantization().map_or("none".to_string(), |q| format!("{q}, read as BF16")),
        "further layers": if mtp == 0 { "none".to_string() } else { format!("multi-token prediction, {mtp} elements") },
        "parameters": total,
        "of those routed": routed,
        "active per token": total - mtp - inactive(config),
        "bytes": checkpoint.bytes_on_disk(),
        "operations": operations(checkpoint, &counts, &widths),
    }))
}

/// `8`, or `4..8` where they differ.
fn range(values: &[usize]) -> String {
    match (values.iter().min(), values.iter().max()) {
        (Some(low), Some(high)) if low == high => low.to_string(),
        (Some(low), Some(high)) => format!("{low}..{high}"),
        _ => "none".to_string(),
    }
}

fn attention(config: &ModelConfig) -> String {
    let attention = softmax_attention(config);
    let convolutions =
        config.layers.iter().filter(|layer| matches!(layer.mixer, Mixer::ShortConvolution { .. })).count();
    if convolutions > 0 {
        return format!("short convolutions in {convolutions} of {} layers; else {attention}", config.layers.len());
    }
    let mut linear = config.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::DeltaNet(delta) => Some(delta),
        _ => None,
    });
    let Some(delta) = linear.next() else { return attention };
    let count = 1 + linear.count();
    format!(
        "gated DeltaNet in {count} of {} layers, {} heads of {} values, {} of {} keys; else {attention}",
        config.layers.len(),
        delta.value_heads,
        delta.value_head_dim,
        delta.key_heads,
        delta.key_head_dim
    )
}

fn softmax_attention(config: &ModelConfig) -> String {
    let attention = &config.attention;
    match &attention.kind {
        AttentionKind::Grouped => {
            let windows = config.layers.iter().filter(|layer| layer.sliding_window.is_some()).count();
            format!(
                "{} heads of {}, {} for keys and values, {windows} layers with a window{}",
                attention.num_heads,
                attention.head_dim,
                attention.num_kv_heads,
                if attention.sinks { ", sinks" } else { "" }
            )
        }
        AttentionKind::Latent(latent) => format!(
            "latent of rank {}, {} heads of {} + {}",
            latent.kv_lora_rank, attention.num_heads, latent.qk_nope_head_dim, latent.qk_rope_head_dim
        ),
        _ => "of a kind that is not run here".to_string(),
    }
}

fn shared(config: &ModelConfig) -> String {
    let shared = config.layers.iter().find_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => moe.shared.as_ref(),
        Ffn::Dense { .. } => None,
    });
    match shared {
        None => "none".to_string(),
        Some(shared) if shared.gated => format!("width {}, gated", shared.intermediate_size),
        Some(shared) => format!("width {}", shared.intermediate_size),
    }
}

fn routing(config: &ModelConfig) -> String {
    let routing = &config.routing;
    let bias = if routing.bias { ", router bias" } else { "" };
    format!("{:?}, scale {}{bias}", routing.kind, routing.scale)
}

/// Biases of routed experts.
fn biases(config: &ModelConfig) -> u64 {
    let experts = config.layers.iter().filter_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => {
            let of = |width: &usize| moe.biases.parameters(config.hidden_size, *width) as u64;
            Some(moe.widths.iter().map(of).sum::<u64>())
        }
        Ffn::Dense { .. } => None,
    });
    experts.sum()
}

/// Parameters of routed experts that a token does not go through, with experts of mean width.
fn inactive(config: &ModelConfig) -> u64 {
    let per_layer = config.layers.iter().filter_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => {
            let hidden = config.hidden_size;
            let of = |width: &usize| (3 * hidden * width + moe.biases.parameters(hidden, *width)) as u64;
            let all: u64 = moe.widths.iter().map(of).sum();
            Some(all - all * config.routing.top_k as u64 / moe.num_experts() as u64)
        }
        Ffn::Dense { .. } => None,
    });
    per_layer.sum()
}

fn operations(checkpoint: &Checkpoint, counts: &[usize], widths: &[usize]) -> Vec<String> {
    let config = checkpoint.config();
    let mut lines = Vec::new();
    let same = widths.iter().all(|width| width == &widths[0]);
    lines.push(match checkpoint.cannot_run() {
        Some(reason) => format!("run, calibrate: no, {reason}"),
        None => "run, calibrate: yes".to_string(),
    });
    lines.push("prune units, ragged or masked: yes".to_string());
    lines.push(match same {
        true => "prune units, uniform: yes, to a width that is a multiple of 8".to_string(),
        false => "prune units, uniform: yes, where all experts end with one width".to_string(),
    });
    let fewest = counts.iter().copied().min().unwrap_or(0);
    lines.push(match config.routing.groups() {
        None if fewest > config.routing.top_k => {
            format!("prune experts: down to {} per layer", config.routing.top_k)
        }
        None => "prune experts: no, the router selects all of them".to_string(),
        Some(groups) => {
            let least = config.routing.top_k.div_ceil(groups.top).max(2);
            match least < fewest / groups.count {
                true => format!("prune experts: as many in each of {} groups, {least} at least", groups.count),
                false => format!("prune experts: no, each of {} groups needs {least}", groups.count),
            }
        }
    });
    if checkpoint.quantization().is_some() {
        lines.push("every export is written as BF16, without quantization".to_string());
    }
    if checkpoint.mtp_tensors().next().is_some() {
        lines.push("multi-token prediction: an export must say whether it is kept or dropped".to_string());
    }
    lines
}
