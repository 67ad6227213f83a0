//! `quantization_config` of what is written.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{QuantizeOptions, WeightFormat};
use crate::Checkpoint;

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
    let weights = |bits: usize, kind: &str, strategy: &str, symmetric: bool| {
        json!({
            "actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": bits, "observer": "minmax",
            "observer_kwargs": {}, "strategy": strategy, "symmetric": symmetric, "type": kind,
        })
    };
    let compressed = |format: &str, weights: Value, inputs: Value| {
        json!({
            "config_groups": {"group_0": {
                "format": format, "input_activations": inputs, "output_activations": null, "targets": ["Linear"],
                "weights": weights,
            }},
            "format": format, "global_compression_ratio": null, "ignore": dense, "kv_cache_scheme": null,
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
        })
    };
    match &options.format {
        WeightFormat::Fp8Blocks { block } => json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": dense, "quant_method": "fp8",
            "weight_block_size": block,
        }),
        WeightFormat::Fp8Channels => {
            let inputs = json!({
                "dynamic": true, "group_size": null, "num_bits": 8, "strategy": "token", "symmetric": true, "type": "float",
            });
            compressed("float-quantized", weights(8, "float", "channel", true), inputs)
        }
        WeightFormat::Mxfp4 if fused => json!({
            "modules_to_not_convert":
                ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        }),
        WeightFormat::Mxfp4 => {
            let mut scheme = weights(4, "float", "group", true);
            (scheme["group_size"], scheme["scale_dtype"]) = (json!(32), json!("torch.uint8"));
            compressed("mxfp4-pack-quantized", scheme, Value::Null)
        }
        WeightFormat::Int { bits, group_size, symmetric } => {
            let strategy = if group_size.is_some() { "group" } else { "channel" };
            let mut scheme = weights(*bits, "int", strategy, *symmetric);
            scheme["group_size"] = json!(group_size);
            compressed("pack-quantized", scheme, Value::Null)
        }
        WeightFormat::Nf4 => json!({
            "_load_in_4bit": true, "_load_in_8bit": false, "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false,
            "llm_int8_skip_modules": dense, "llm_int8_threshold": 6.0, "load_in_4bit": true, "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        }),
        WeightFormat::Nvfp4 => {
            let mut scheme = weights(4, "float", "tensor_group", true);
            (scheme["group_size"], scheme["scale_dtype"]) = (json!(16), json!("torch.float8_e4m3fn"));
            compressed("nvfp4-pack-quantized", scheme, Value::Null)
        }
    }
}
