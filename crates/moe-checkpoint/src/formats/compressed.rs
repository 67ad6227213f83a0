//! What configs of compressed-tensors say: groups of modules, each with a scheme for its weights.

use serde_json::Value;

/// The schemes of weights of all groups.
pub(super) fn weights(config: &Value) -> impl Iterator<Item = &Value> {
    let groups = config["config_groups"].as_object().into_iter().flatten();
    groups.map(|(_, group)| &group["weights"]).filter(|weights| weights.is_object())
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
