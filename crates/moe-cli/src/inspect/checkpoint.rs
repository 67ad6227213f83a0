//! What a checkpoint is.

use moe_checkpoint::{
    AttentionKind, Checkpoint, CompressedAttention, ExpertLayout, Ffn, Groups, Mixer, ModelConfig, RoutingKind,
};
use serde_json::{Value, json};

use crate::Result;

/// What a checkpoint is and what may be done with it.
pub(super) fn facts(checkpoint: &Checkpoint) -> Result<Value> {
    let (config, shape) = (checkpoint.config(), checkpoint.shape());
    let counts: Vec<usize> = shape.layers.iter().map(|layer| layer.num_experts()).collect();
    let widths: Vec<usize> = shape.layers.iter().flat_map(|layer| layer.widths.iter().copied()).collect();
    let layouts: Vec<ExpertLayout> = shape
        .layers
        .iter()
        .map(|layer| checkpoint.expert_layout(layer.layer))
        .collect::<moe_checkpoint::Result<_>>()?;
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
        "layers": layers(config),
        "hidden size": config.hidden_size,
        "attention": attention(config),
        "routed experts": format!("{} per MoE layer, {} per token", range(&counts), shape.top_k),
        "expert width": range(&widths),
        "experts read": match config.expert_latent {
            Some(width) => format!("a latent of width {width}"),
            None => "the residual stream".to_string(),
        },
        "expert layout": format!("{}{}", layout(layouts.first()), if layouts.windows(2).all(|l| l[0] == l[1]) { "" } else { ", mixed" }),
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

/// How many layers there are of which kind: those with experts, those with another feed-forward half, and those that
/// only look at other tokens, by how they do.
fn layers(config: &ModelConfig) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for layer in &config.layers {
        let kind = match (&layer.ffn, &layer.mixer) {
            (Ffn::Moe(_), _) => "MoE",
            (Ffn::Dense { .. }, _) => "dense",
            (Ffn::None, Mixer::Attention) => "attention alone",
            (Ffn::None, Mixer::DeltaNet(_)) => "gated DeltaNet alone",
            (Ffn::None, Mixer::ChannelDelta(_)) => "Kimi delta attention alone",
            (Ffn::None, Mixer::ShortConvolution { .. }) => "short convolution alone",
            (Ffn::None, Mixer::Mamba(_)) => "Mamba2 alone",
            (Ffn::None, Mixer::HeadMixture(_)) => "a mixture of attention heads alone",
            (Ffn::None, Mixer::Lightning(_)) => "lightning attention alone",
            (Ffn::None, Mixer::Compressed(_)) => "attention to compressed keys alone",
            (Ffn::None, _) => "of another kind",
        };
        match counts.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => counts.push((kind, 1)),
        }
    }
    counts.sort_by_key(|(kind, _)| *kind != "MoE");
    let counts: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    format!("{} ({})", config.layers.len(), counts.join(", "))
}

fn attention(config: &ModelConfig) -> String {
    let attention = softmax_attention(config);
    let convolutions =
        config.layers.iter().filter(|layer| matches!(layer.mixer, Mixer::ShortConvolution { .. })).count();
    if convolutions > 0 {
        return format!("short convolutions in {convolutions} of {} layers; else {attention}", config.layers.len());
    }
    let mut spaces = config.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::Mamba(mamba) => Some(mamba),
        _ => None,
    });
    if let Some(mamba) = spaces.next() {
        return format!(
            "Mamba2 in {} of {} layers, {} heads of {}, a state of {}; else {attention}",
            1 + spaces.count(),
            config.layers.len(),
            mamba.heads,
            mamba.head_dim,
            mamba.state
        );
    }
    if let Some(Mixer::Compressed(compressed)) = config.layers.first().map(|layer| &layer.mixer) {
        return compressed_attention(config, compressed);
    }
    if let Some(Mixer::HeadMixture(mixture)) = config.layers.first().map(|layer| &layer.mixer) {
        return format!(
            "mixture of heads, {} of {} experts per token with {} heads of {} each",
            mixture.top_k, mixture.experts, mixture.kv_heads, mixture.head_dim
        );
    }
    let mut lightning = config.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::Lightning(lightning) => Some(lightning),
        _ => None,
    });
    if let Some(first) = lightning.next() {
        return format!(
            "lightning attention in {} of {} layers, {} heads of {}; else {attention}",
            1 + lightning.count(),
            config.layers.len(),
            first.heads,
            first.head_dim
        );
    }
    let mut by_channel = config.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::ChannelDelta(delta) => Some(delta),
        _ => None,
    });
    if let Some(delta) = by_channel.next() {
        return format!(
            "Kimi delta attention in {} of {} layers, {} heads of {}; else {attention}",
            1 + by_channel.count(),
            config.layers.len(),
            delta.heads,
            delta.head_dim
        );
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

/// Attention of layers to a window and to compressed keys, and the streams around it.
fn compressed_attention(config: &ModelConfig, first: &CompressedAttention) -> String {
    let mut rates: Vec<(usize, usize)> = Vec::new();
    for layer in &config.layers {
        let Mixer::Compressed(CompressedAttention { compression: Some(compression), .. }) = &layer.mixer else {
            continue;
        };
        match rates.iter_mut().find(|(rate, _)| *rate == compression.rate) {
            Some((_, count)) => *count += 1,
            None => rates.push((compression.rate, 1)),
        }
    }
    rates.sort_unstable();
    let rates: Vec<String> =
        rates.iter().map(|(rate, count)| format!(", one key for {rate} tokens in {count} layers")).collect();
    let streams = config.streams.as_ref().map_or(1, |streams| streams.count);
    format!(
        "{} heads of {}, one for keys that are values, a window of {}{}; {streams} residual streams",
        first.heads,
        first.head_dim,
        first.window,
        rates.concat()
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
        Ffn::Dense { .. } | Ffn::None => None,
    });
    match shared {
        None => "none".to_string(),
        Some(shared) if shared.gated => format!("width {}, gated", shared.intermediate_size),
        Some(shared) if shared.averaged => {
            format!("width {}, averaged with the routed ones", shared.intermediate_size)
        }
        Some(shared) => format!("width {}", shared.intermediate_size),
    }
}

fn routing(config: &ModelConfig) -> String {
    let routing = &config.routing;
    let yes = |flag: bool, text: &str| if flag { text.to_string() } else { String::new() };
    let grouped = |groups: &Groups| format!(", within the best {} of {} groups", groups.top, groups.count);
    let rule = match &routing.kind {
        RoutingKind::SoftmaxTopK { renormalize } => {
            format!("softmax, then top k{}", yes(*renormalize, ", renormalized"))
        }
        RoutingKind::TopKSoftmax => "top k, then softmax".to_string(),
        RoutingKind::SoftmaxGroupTopK { groups } => format!("softmax, then top k{}", grouped(groups)),
        RoutingKind::SoftmaxCorrected { norm_min } => {
            format!("softmax, top k by softmax plus a correction bias{}", yes(norm_min.is_some(), ", renormalized"))
        }
        RoutingKind::Sigmoid { renormalize, correction_bias, groups } => format!(
            "sigmoid, then top k{}{}{}",
            yes(*correction_bias, " by sigmoid plus a correction bias"),
            groups.as_ref().map(grouped).unwrap_or_default(),
            yes(*renormalize, ", renormalized")
        ),
        RoutingKind::SqrtSoftplus => {
            "square root of softplus, then top k by that plus a correction bias, renormalized".to_string()
        }
        RoutingKind::Sparsemixer { .. } => "sparsemixer: two experts, one after the other".to_string(),
        other => words(other),
    };
    let tables = (0..config.layers.len()).filter(|layer| config.moe(*layer).is_some_and(|moe| moe.by_table)).count();
    let tables = yes(tables > 0, &format!("; experts by a table of the vocabulary in {tables} layers"));
    format!("{rule}, scale {}{}{tables}", routing.scale, yes(routing.bias, ", router bias"))
}

/// How experts are stored.
fn layout(layout: Option<&ExpertLayout>) -> String {
    layout.map_or("none".to_string(), words)
}

/// The name of a variant in words: `FusedTransposed` is "fused transposed". Fields are left out.
fn words(value: impl std::fmt::Debug) -> String {
    moe_checkpoint::human::variant(&value).replace('_', " ")
}

/// Biases of routed experts.
fn biases(config: &ModelConfig) -> u64 {
    let experts = config.layers.iter().filter_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => {
            let of = |width: &usize| moe.biases.parameters(config.expert_hidden_size(), *width) as u64;
            Some(moe.widths.iter().map(of).sum::<u64>())
        }
        Ffn::Dense { .. } | Ffn::None => None,
    });
    experts.sum()
}

/// Parameters of routed experts that a token does not go through, with experts of mean width.
fn inactive(config: &ModelConfig) -> u64 {
    let per_layer = config.layers.iter().filter_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => {
            let hidden = config.expert_hidden_size();
            let matrices = if moe.gateless { 2 } else { 3 };
            let of = |width: &usize| (matrices * hidden * width + moe.biases.parameters(hidden, *width)) as u64;
            let all: u64 = moe.widths.iter().map(of).sum();
            Some(all - all * config.routing.top_k as u64 / moe.num_experts() as u64)
        }
        Ffn::Dense { .. } | Ffn::None => None,
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
    if checkpoint.grouped() {
        lines.push(
            "prune: no, experts share sets of weights; merge with --form stock-copies makes a plain one".to_string(),
        );
        return lines;
    }
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
        lines.push(
            "pruned to one width it stays quantized; merged, fine-tuned or in other forms it is written as BF16"
                .to_string(),
        );
    }
    if checkpoint.mtp_tensors().next().is_some() {
        lines.push("multi-token prediction: an export must say whether it is kept or dropped".to_string());
    }
    lines
}
