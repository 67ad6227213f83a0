//! What a checkpoint is and what may be done to it, from its config and its headers only.
//!
//! ```text
//! cargo run --release --example inspect -- models/Qwen1.5-MoE-A2.7B [--json]
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use moe_checkpoint::{AttentionKind, Checkpoint, ExpertLayout, Ffn, ModelConfig};
use serde_json::{Value, json};

/// Tells family, layers, experts, routing, sizes and possible operations of a Mixture-of-Experts checkpoint.
#[derive(Parser)]
struct Arguments {
    /// A Hugging Face model directory.
    directory: PathBuf,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&arguments.directory)?;
    let facts = facts(&checkpoint)?;
    if arguments.json {
        println!("{facts:#}");
        return Ok(());
    }
    for (name, value) in facts.as_object().into_iter().flatten() {
        match value {
            Value::String(text) => println!("{name:<18} {text}"),
            Value::Array(lines) => {
                for (index, line) in lines.iter().filter_map(Value::as_str).enumerate() {
                    println!("{:<18} {line}", if index == 0 { name } else { "" });
                }
            }
            value => println!("{name:<18} {value}"),
        }
    }
    println!("{:<18} {:.0} ms, headers only", "read in", start.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

fn facts(checkpoint: &Checkpoint) -> Result<Value, Box<dyn Error>> {
    let (config, shape) = (checkpoint.config(), checkpoint.shape());
    let counts: Vec<usize> = shape.layers.iter().map(|layer| layer.num_experts()).collect();
    let widths: Vec<usize> = shape.layers.iter().flat_map(|layer| layer.widths.iter().copied()).collect();
    let layouts: Vec<ExpertLayout> =
        shape.layers.iter().map(|layer| checkpoint.expert_layout(layer.layer)).collect::<Result<_, _>>()?;
    let dense = config.layers.len() - shape.layers.len();
    let (total, routed) = (checkpoint.parameters(), shape.parameters() + biases(config));
    let mtp: u64 = checkpoint.mtp_tensors().map(|tensor| tensor.elements()).sum();
    Ok(json!({
        "family": config.model_type,
        "layers": format!("{} ({} MoE, {dense} dense)", config.layers.len(), shape.layers.len()),
        "hidden size": config.hidden_size,
        "attention": attention(config),
        "routed experts": format!("{} per MoE layer, {} per token", range(&counts), shape.top_k),
        "expert width": range(&widths),
        "expert layout": format!("{:?}{}", layouts[0], if layouts.iter().all(|l| *l == layouts[0]) { "" } else { ", mixed" }),
        "shared experts": shared(config),
        "routing": routing(config),
        "quantisation": checkpoint.quantisation().map_or("none".to_string(), |q| format!("{q:?}, read as BF16")),
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
    lines.push(match config.attention.kind {
        AttentionKind::Other => "run, calibrate: no, the attention is not implemented".to_string(),
        _ => "run, calibrate: yes".to_string(),
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
    if checkpoint.quantisation().is_some() {
        lines.push("every export is written as BF16, without quantisation".to_string());
    }
    if checkpoint.mtp_tensors().next().is_some() {
        lines.push("multi-token prediction: an export must say whether it is kept or dropped".to_string());
    }
    lines
}
