//! Quantized checkpoints: every weight as the package that owns its format decodes it, bit for bit.

use crate::common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Model, assert_parts};
use moe_checkpoint::{Checkpoint, Dtype, Existing, ExpertPart, SafetensorsFile, WriteOptions, write};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized")
}

fn fixtures() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    found.sort();
    assert_eq!(found.len(), 37);
    found
}

/// Weights without quantization, in f32.
fn expected(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
    let names: Vec<String> = file.tensors().map(|tensor| tensor.name.clone()).collect();
    let weights = names.iter().filter_map(|name| Some((name.strip_prefix("dequantised.")?.to_string(), name)));
    weights.map(|(weight, name)| (weight, file.f32(name).unwrap())).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn rounded(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
}

#[test]
fn every_weight_is_what_the_package_of_its_format_decodes() {
    for dir in fixtures() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = Checkpoint::open(&dir).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(model.quantization().is_some(), "{name}");
        let expected = expected(&dir);
        assert!(!expected.is_empty(), "{name}");
        for (weight, values) in &expected {
            let found = model.dequantized_f32(weight).unwrap().unwrap_or_else(|| panic!("{name}: {weight} is dense"));
            assert!(bits(&found) == bits(values), "{name}: {weight}");
            let end = 2 * values.len();
            let bytes = rounded(values);
            assert!(*model.plain_bytes(weight, 0..end).unwrap() == bytes, "{name}: {weight}");
            assert!(*model.plain_bytes(weight, 6..end - 2).unwrap() == bytes[6..end - 2], "{name}: {weight}");
            let mut streamed = Vec::new();
            model
                .stream_plain(weight, 100, |part| {
                    streamed.extend_from_slice(part);
                    Ok(())
                })
                .unwrap();
            assert!(streamed == bytes, "{name}: {weight}");
            assert_eq!(model.plain_dtype(weight).unwrap(), Dtype::BF16);
            let near: Vec<f32> = values.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
            assert!(model.tensor_f32(weight).unwrap() == near, "{name}: {weight}");
        }
        // Every other quantized weight is decoded to numbers, and there is no expert among the dense ones.
        for info in model.plain_tensors() {
            let quantized = model.dequantized_f32(&info.name).unwrap();
            assert!(quantized.is_some() || !info.name.contains(".experts.") || info.name.ends_with("bias"), "{name}");
        }
    }
}

#[test]
fn a_dequantized_model_has_the_same_weights_and_no_trace_of_quantization() {
    let dir = tempfile::tempdir().unwrap();
    for fixture in fixtures() {
        let name = fixture.file_name().unwrap().to_string_lossy().into_owned();
        let model = Arc::new(Checkpoint::open(&fixture).unwrap());
        let plain = model.dequantized().unwrap();
        assert_eq!((plain.quantization(), plain.fingerprint()), (None, model.fingerprint()), "{name}");
        assert_eq!(plain.parameters(), model.parameters(), "{name}");
        let out = dir.path().join("out");
        write(&plain, &out, &WriteOptions { existing: Existing::Force, ..WriteOptions::default() }).unwrap();
        assert!(!out.join("hf_quant_config.json").exists());
        let written = Checkpoint::open(&out).unwrap();
        assert_eq!(written.raw_config().to_string().matches("quant").count(), 0, "{name}");
        for info in model.plain_tensors() {
            let bytes = model.plain_bytes(&info.name, 0..info.bytes as usize);
            let bytes = bytes.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(written.bytes(&info.name).unwrap(), bytes, "{name}: {}", info.name);
        }
        for layer in &model.shape().layers {
            for expert in 0..layer.num_experts() {
                assert_eq!(
                    written.expert(layer.layer, expert).unwrap(),
                    model.expert(layer.layer, expert).unwrap(),
                    "{name}"
                );
                for part in ExpertPart::ALL {
                    let [a, b] = [&*model, &written].map(|model| model.expert_part(layer.layer, expert, part).unwrap());
                    assert_eq!(a.unwrap().bytes, b.unwrap().bytes, "{name}");
                }
            }
        }
        // The copy of what is quantized is quantized, byte for byte.
        write(&model, &out, &WriteOptions { existing: Existing::Force, ..WriteOptions::default() }).unwrap();
        let copy = Checkpoint::open(&out).unwrap();
        assert_eq!(copy.raw_config(), model.raw_config());
        assert_eq!(out.join("hf_quant_config.json").exists(), fixture.join("hf_quant_config.json").exists());
        for info in model.tensors() {
            assert_eq!(copy.bytes(&info.name).unwrap(), model.bytes(&info.name).unwrap(), "{name}: {}", info.name);
        }
    }
}

fn model(name: &str) -> Model {
    Model::load(&folder().join(name))
}

/// A name of a tensor with this ending.
fn named(model: &Model, ending: &str) -> String {
    model.tensors.keys().find(|name| name.ends_with(ending)).unwrap_or_else(|| panic!("no {ending}")).clone()
}

#[test]
fn companions_that_are_missing_or_do_not_fit_are_named() {
    for (fixture, ending, parts) in [
        ("fp8-block-16x32-glm4_moe", "gate_proj.weight_scale_inv", &["gate_proj.weight", "\"fp8\"", "companions"][..]),
        ("ct-int4-sharded-glm4_moe", "down_proj.weight_scale", &["weight_packed", "weight_scale"]),
        ("ct-int4-sharded-glm4_moe", "down_proj.weight_shape", &["weight_packed", "weight_shape"]),
        ("ct-nvfp4-qwen3_moe", "down_proj.weight_scale", &["weight_packed", "weight_scale"]),
        ("gptq-v1-sym-qwen3_moe", "down_proj.qzeros", &["down_proj.qweight", "qzeros"]),
        ("awq-gemm-qwen3_moe", "down_proj.scales", &["down_proj.qweight", "scales"]),
        ("bnb-nf4-nested-qwen3_moe", "down_proj.weight.quant_map", &["down_proj.weight", "quant_map"]),
        ("bnb-fp4-qwen3_moe", "down_proj.weight.absmax", &["down_proj.weight", "bitsandbytes", "companions"]),
        ("mlx-affine4-qwen3_moe", "down_proj.biases", &["down_proj.weight", "biases"]),
        ("mxfp4-gpt_oss", "down_proj_scales", &["down_proj_blocks", "down_proj_scales"]),
    ] {
        let mut lacking = model(fixture);
        let name = named(&lacking, ending);
        lacking.tensors.remove(&name);
        assert_parts(&lacking.refusal(), parts);
    }
    // A companion without its weight.
    let mut alone = model("ct-int4-sharded-glm4_moe");
    let name = named(&alone, "down_proj.weight_packed");
    alone.tensors.remove(&name);
    assert_parts(&alone.refusal(), &["down_proj.weight"]);
    let mut reshaped = model("gptq-v1-sym-qwen3_moe");
    let name = named(&reshaped, "down_proj.scales");
    reshaped.tensor(&name).shape.reverse();
    assert_parts(&reshaped.refusal(), &["down_proj.scales"]);
}

#[test]
fn what_is_not_read_is_refused_by_name_with_the_way_out() {
    let with = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut model = model(name);
        change(&mut model.config["quantization_config"]);
        model.refusal()
    };
    use serde_json::json;
    let online = json!({"config_groups": {"R3": {"type": "hadamard", "apply": [{"location": "q_attn"}]}}});
    assert_parts(
        &with("ct-int4-sharded-glm4_moe", &|q| q["transform_config"] = online.clone()),
        &["config.json", "transform_config", "`q_attn`", "original checkpoint"],
    );
    let sparse = json!({"format": "sparse-24-bitmask"});
    assert_parts(
        &with("ct-int4-sharded-glm4_moe", &|q| q["sparsity_config"] = sparse.clone()),
        &["sparse-24-bitmask", "dequantize it"],
    );
    assert_parts(&with("ct-int4-sharded-glm4_moe", &|q| q["format"] = json!("marlin-24")), &["marlin-24"]);
    assert_parts(&with("awq-gemm-qwen3_moe", &|q| q["version"] = json!("gemv")), &["gemv", "version"]);
    assert_parts(&with("modelopt-nvfp4-qwen3_moe", &|q| q["quant_algo"] = json!("W4A16_AWQ")), &["W4A16_AWQ"]);
    assert_parts(
        &with("gptq-v1-sym-qwen3_moe", &|q| q["quant_method"] = json!("hqq")),
        &["hqq", "original checkpoint"],
    );
    assert_parts(&with("gptq-v1-sym-qwen3_moe", &|q| q["checkpoint_format"] = json!("marlin")), &["marlin"]);
    let mut three = model("gptq-v1-sym-qwen3_moe");
    let name = named(&three, "down_proj.qzeros");
    let zeros = three.tensor(&name);
    zeros.shape[1] = 6;
    zeros.bytes.truncate(24 * zeros.shape[0]);
    assert_parts(&three.refusal(), &["qweight", "3 were found", "GPTQModel"]);
    let mut scaled = model("modelopt-nvfp4-qwen3_moe");
    let scale = scaled.tensors[&named(&scaled, "down_proj.weight_scale_2")].clone();
    scaled.tensors.insert("model.layers.0.mlp.experts.0.down_proj.pre_quant_scale".into(), scale);
    assert_parts(&scaled.refusal(), &["pre_quant_scale", "fold"]);
    let scale = scaled.tensors[&named(&scaled, "down_proj.weight_scale_2")].clone();
    for (ending, parts) in
        [("svdquant_lora_a", ["SVDQuant", "original checkpoint"]), ("weight_bitmask", ["2:4", "decompress them"])]
    {
        let mut beside = model("modelopt-nvfp4-qwen3_moe");
        beside.tensors.insert(format!("model.layers.0.mlp.experts.0.down_proj.{ending}"), scale.clone());
        assert_parts(&beside.refusal(), &[ending, parts[0], parts[1]]);
    }
    let mut tiled = model("bnb-int8-qwen3_moe");
    let name = named(&tiled, "down_proj.weight_format");
    tiled.tensor(&name).bytes = vec![2];
    assert_parts(&tiled.refusal(), &["weight_format", "save the model again"]);
    // Old exports of ModelOpt have their entry in another file.
    let mut old = model("modelopt-nvfp4-qwen3_moe");
    old.config.as_object_mut().unwrap().remove("quantization_config");
    assert_parts(&old.refusal(), &["quantization_config"]);
}

#[test]
fn codes_that_are_no_numbers_are_an_error_with_the_tensor() {
    let mut damaged = model("fp8-block-16x32-glm4_moe");
    let name = named(&damaged, "experts.0.down_proj.weight");
    damaged.tensor(&name).bytes[5] = 0x7F;
    let (_dir, opened) = damaged.open();
    let error = opened.unwrap().expert(1, 0).unwrap_err().to_string();
    assert_parts(&error, &["experts.0.down_proj.weight", "FP8", "damaged"]);
}

#[test]
fn layers_have_as_many_experts_as_compressed_tensors_says_of_each() {
    let mut pruned = model("ct-int8-g32-w8a16-qwen3_moe");
    let whole = Checkpoint::open(folder().join("ct-int8-g32-w8a16-qwen3_moe")).unwrap();
    let layers = whole.config().layers.len();
    let cut = whole.shape().layers.last().unwrap().layer;
    let (count, top_k) = (whole.shape().layer(cut).unwrap().num_experts(), whole.config().routing.top_k);
    assert!(count > top_k);
    let last = format!("model.layers.{cut}.mlp.experts.{}.", count - 1);
    pruned.tensors.retain(|name, _| !name.starts_with(&last));
    let router = pruned.tensor(&format!("model.layers.{cut}.mlp.gate.weight"));
    let row = router.bytes.len() / count;
    router.bytes.truncate(row * (count - 1));
    router.shape[0] = count - 1;
    let mut counts = vec![serde_json::Value::Null; layers];
    counts[cut] = (count - 1).into();
    let sparsity = serde_json::json!({"method": "prune", "num_experts": counts});
    assert!(pruned.open().1.is_err(), "without it the config asks for {count}");
    pruned.config["quantization_config"]["moe_sparsity_config"] = sparsity;
    let (_dir, opened) = pruned.open();
    let opened = Arc::new(opened.unwrap());
    assert_eq!(opened.shape().layer(cut).unwrap().num_experts(), count - 1);
    // Without quantization it is a ragged model with the same experts.
    let plain = opened.dequantized().unwrap();
    assert_eq!(plain.shape(), opened.shape());
    for expert in 0..count - 1 {
        assert_eq!(plain.expert(cut, expert).unwrap(), whole.expert(cut, expert).unwrap());
    }
    pruned.config["quantization_config"]["moe_sparsity_config"]["num_experts"] = serde_json::json!(vec![1; layers + 1]);
    assert_parts(&pruned.refusal(), &["config.json", "moe_sparsity_config.num_experts", "one per decoder layer"]);
    counts_refused(&mut pruned, layers, cut, top_k - 1);
}

/// Fewer experts than a token is routed to.
fn counts_refused(model: &mut Model, layers: usize, layer: usize, count: usize) {
    let mut counts = vec![serde_json::Value::Null; layers];
    counts[layer] = count.into();
    model.config["quantization_config"]["moe_sparsity_config"]["num_experts"] = serde_json::json!(counts);
    assert_parts(&model.refusal(), &["config.json", "num_experts[", &format!("at least {}", count + 1)]);
}
