//! `quantization_config` of what is written.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::source::{Content, Weight};
use super::{QuantizeOptions, WeightFormat};
use crate::Checkpoint;
use crate::formats::module;

/// Modules of matrices that stay dense, in order.
pub(super) fn dense_modules(from: &Checkpoint, quantized: &BTreeSet<String>) -> Vec<String> {
    let matrix = from.tensors().filter(|info| info.shape.len() == 2 && !quantized.contains(&info.name));
    let modules = matrix.filter_map(|info| info.name.strip_suffix(".weight"));
    modules.filter(|module| !module.ends_with("embed_tokens")).map(str::to_string).collect()
}

/// The entry for these options; `dense` are the modules that it must not claim, `fused` the layout of gpt-oss.
pub(super) fn entry(options: &QuantizeOptions, dense: &[String], fused: bool) -> Value {
    // A head tied to the embedding has no tensor, but loaders build the module.
    let mut dense = dense.to_vec();
    if !dense.iter().any(|module| module.ends_with("lm_head")) {
        dense.push("lm_head".into());
    }
    let compressed = || {
        let (format, group) = group(&options.format, json!(["Linear"]));
        compressed(format, json!({ "group_0": group }), &dense)
    };
    match &options.format {
        WeightFormat::Fp8Blocks { block } => json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": dense, "quant_method": "fp8",
            "weight_block_size": block,
        }),
        WeightFormat::Mxfp4 if fused => json!({
            "modules_to_not_convert":
                ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        }),
        WeightFormat::Nf4 => json!({
            "_load_in_4bit": true, "_load_in_8bit": false, "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false,
            "llm_int8_skip_modules": dense, "llm_int8_threshold": 6.0, "load_in_4bit": true, "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        }),
        _ => compressed(),
    }
}

/// The entry of compressed-tensors.
fn compressed(format: &str, groups: Value, dense: &[String]) -> Value {
    json!({
        "config_groups": groups, "format": format, "global_compression_ratio": null, "ignore": dense,
        "kv_cache_scheme": null, "quant_method": "compressed-tensors", "quantization_status": "compressed",
    })
}

/// A group of the config of compressed-tensors: what the format is called, and the group.
fn group(format: &WeightFormat, targets: Value) -> (&'static str, Value) {
    let weights = |bits: usize, kind: &str, strategy: &str, symmetric: bool| {
        json!({
            "actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": bits, "observer": "minmax",
            "observer_kwargs": {}, "strategy": strategy, "symmetric": symmetric, "type": kind,
        })
    };
    let mut inputs = Value::Null;
    let (name, scheme) = match format {
        WeightFormat::Mxfp4 => {
            let mut scheme = weights(4, "float", "group", true);
            (scheme["group_size"], scheme["scale_dtype"]) = (json!(32), json!("torch.uint8"));
            ("mxfp4-pack-quantized", scheme)
        }
        WeightFormat::Int { bits, group_size, symmetric } => {
            let strategy = if group_size.is_some() { "group" } else { "channel" };
            let mut scheme = weights(*bits, "int", strategy, *symmetric);
            scheme["group_size"] = json!(group_size);
            ("pack-quantized", scheme)
        }
        WeightFormat::Ternary => ("pack-quantized", weights(2, "int", "channel", true)),
        WeightFormat::Nvfp4 => {
            let mut scheme = weights(4, "float", "tensor_group", true);
            (scheme["group_size"], scheme["scale_dtype"]) = (json!(16), json!("torch.float8_e4m3fn"));
            ("nvfp4-pack-quantized", scheme)
        }
        // FP8 per row; FP8 in blocks and NF4 have entries of their own.
        _ => {
            inputs = json!({
                "dynamic": true, "group_size": null, "num_bits": 8, "strategy": "token", "symmetric": true, "type": "float",
            });
            ("float-quantized", weights(8, "float", "channel", true))
        }
    };
    let group = json!({
        "format": name, "input_activations": inputs, "output_activations": null, "targets": targets, "weights": scheme,
    });
    (name, group)
}

/// The entry of several formats, each with the modules that have it.
pub(super) fn mixed_entry(targets: &[(WeightFormat, Vec<String>)], dense: &[String]) -> Value {
    let mut dense = dense.to_vec();
    if !dense.iter().any(|module| module.ends_with("lm_head")) {
        dense.push("lm_head".into());
    }
    let mut groups = serde_json::Map::new();
    let mut names = BTreeSet::new();
    for (number, (format, modules)) in targets.iter().enumerate() {
        let (name, group) = group(format, json!(modules));
        names.insert(name);
        groups.insert(format!("group_{number}"), group);
    }
    let format = match names.first() {
        Some(name) if names.len() == 1 => name,
        _ => "mixed-precision",
    };
    compressed(format, Value::Object(groups), &dense)
}

/// Numbers of experts by what stands before them in the names of their modules.
type ExpertsOfLayers = BTreeMap<String, BTreeSet<usize>>;

/// Formats and the modules that have them, as patterns: one per layer for experts, one per module for others.
pub(super) fn targets(weights: &[Weight], formats: &[WeightFormat]) -> Vec<(WeightFormat, Vec<String>)> {
    // By layer (what stands before the number of an expert): formats, and experts that have each.
    let mut by_format: Vec<(WeightFormat, ExpertsOfLayers, Vec<String>)> = Vec::new();
    let mut counts = ExpertsOfLayers::new();
    for (weight, format) in weights.iter().zip(formats) {
        let at = match by_format.iter().position(|(found, ..)| found == format) {
            Some(at) => at,
            None => {
                by_format.push((format.clone(), BTreeMap::new(), Vec::new()));
                by_format.len() - 1
            }
        };
        let module = module(&weight.name);
        let expert = match weight.content.first() {
            Some(Content::Expert { set, .. }) => {
                module.rsplit_once(&format!(".{set}.")).map(|(before, _)| (before, *set))
            }
            _ => None,
        };
        match expert {
            Some((before, set)) => {
                by_format[at].1.entry(before.to_string()).or_default().insert(set);
                counts.entry(before.to_string()).or_default().insert(set);
            }
            None => by_format[at].2.push(module.to_string()),
        }
    }
    let pattern = |before: &str, sets: &BTreeSet<usize>| {
        let escaped = before.replace('.', "\\.");
        match counts.get(before) {
            Some(all) if all == sets => format!("re:{escaped}\\..*"),
            _ => {
                let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
                format!("re:{escaped}\\.({})\\..*", sets.join("|"))
            }
        }
    };
    let of_format = |(format, layers, others): (WeightFormat, BTreeMap<String, BTreeSet<usize>>, Vec<String>)| {
        let mut modules: Vec<String> = layers.iter().map(|(before, sets)| pattern(before, sets)).collect();
        modules.extend(others);
        (format, modules)
    };
    by_format.into_iter().map(of_format).collect()
}
