//! What configs of compressed-tensors say: groups of modules, each with a scheme for its weights.

use serde_json::Value;

use crate::config::{Ffn, ModelConfig};
use crate::{Error, Result};

/// The schemes of weights of all groups.
pub(super) fn weights(config: &Value) -> impl Iterator<Item = &Value> {
    let groups = config["config_groups"].as_object().into_iter().flatten();
    groups.map(|(_, group)| &group["weights"]).filter(|weights| weights.is_object())
}

/// Takes the number of routed experts of each layer from `moe_sparsity_config` (compressed-tensors 0.20, as REAP and
/// MoNe leave it: `{"method": "prune", "num_experts": [null, 129, …]}`, an entry per decoder layer); null leaves the
/// config's.
///
/// # Errors
/// [`Error::InvalidField`] for a list that does not fit the model.
pub(crate) fn experts_per_layer(config: &Value, parsed: &mut ModelConfig) -> Result<()> {
    let entry = &super::entry(config)["moe_sparsity_config"];
    if entry.is_null() {
        return Ok(());
    }
    let invalid = |field: &str, found: &Value, expected: String| {
        let field = format!("quantization_config.moe_sparsity_config.{field}");
        let found: String = found.to_string().chars().take(80).collect();
        Err(Error::InvalidField { file: "config.json".into(), field, found, expected })
    };
    if !entry["method"].is_null() && entry["method"] != "prune" {
        return invalid("method", &entry["method"], "\"prune\"".into());
    }
    let counts = &entry["num_experts"];
    let layers = parsed.layers.len();
    let Some(list) = counts.as_array().filter(|list| list.len() == layers) else {
        return invalid("num_experts", counts, format!("a list of {layers} numbers or nulls, one per decoder layer"));
    };
    let top_k = parsed.routing.top_k;
    for (layer, (count, config)) in list.iter().zip(&mut parsed.layers).enumerate() {
        if count.is_null() {
            continue;
        }
        let wanted = count.as_u64().filter(|count| *count as usize >= top_k && *count < 1 << 20);
        let (Some(wanted), Ffn::Moe(moe)) = (wanted, &mut config.ffn) else {
            let expected = format!("at least {top_k} experts of an MoE layer, or null");
            return invalid(&format!("num_experts[{layer}]"), count, expected);
        };
        let width = moe.widths.first().copied().unwrap_or(0);
        moe.widths = vec![width; wanted as usize];
    }
    Ok(())
}

/// Why a checkpoint of compressed-tensors is not read; `None` for one that is.
pub(super) fn refusal(config: &Value) -> Option<String> {
    let method = "dequantize it with compressed-tensors, or take the original checkpoint";
    let sparsity = &config["sparsity_config"];
    if let Some(format) = sparsity["format"].as_str().filter(|format| *format != "dense") {
        return Some(format!("`sparsity_config.format` = \"{format}\"; {method}"));
    }
    // Transforms of weights are in the weights already; others run at inference.
    let groups = config["transform_config"]["config_groups"].as_object();
    for (name, group) in groups.into_iter().flatten() {
        for apply in group["apply"].as_array().into_iter().flatten() {
            let location = apply["location"].as_str().unwrap_or_default();
            if !location.starts_with("weight_") {
                return Some(format!(
                    "`transform_config.config_groups.{name}` transforms `{location}` at inference; {method}"
                ));
            }
        }
    }
    let formats = config["config_groups"].as_object().into_iter().flatten().map(|(_, group)| &group["format"]);
    let unread = formats.chain([&config["format"]]).filter_map(Value::as_str).find(|format| !FORMATS.contains(format));
    unread.map(|format| format!("`format` = \"{format}\"; {method}"))
}

const FORMATS: [&str; 10] = [
    "dense",
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "",
];
