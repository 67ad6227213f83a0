//! Nothing that a file can hold makes the reader panic.

mod common;

use std::fs;
use std::sync::OnceLock;

use common::{Model, fixture};
use moe_checkpoint::{Checkpoint, ModelConfig, Role};
use proptest::prelude::*;
use serde_json::{Value, json};

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| Model::load(&fixture("tf5/qwen2_moe_mixed")))
}

/// Opens a directory with this weight file, and reads everything if it opens.
fn exercise(config: &[u8], files: &[(&str, &[u8])]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return false };
    checkpoint.fingerprint();
    for tensor in checkpoint.tensors() {
        checkpoint.bytes(&tensor.name).unwrap();
        let _ = checkpoint.tensor_f32(&tensor.name);
    }
    checkpoint.read_f32(Role::LmHead).unwrap();
    for layer in &checkpoint.shape().layers {
        for expert in 0..layer.num_experts() {
            checkpoint.expert(layer.layer, expert).unwrap();
        }
    }
    true
}

fn hostile_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!(0)),
        Just(json!(-1)),
        Just(json!(1)),
        Just(json!(3)),
        Just(json!(u64::MAX)),
        Just(json!(i64::MIN)),
        Just(json!(1e308)),
        Just(json!(0.5)),
        Just(json!(true)),
        Just(json!([])),
        Just(json!([u64::MAX, -1, "x"])),
        Just(json!({})),
        Just(json!({"rope_type": "yarn", "factor": 0, "original_max_position_embeddings": 0})),
        Just(json!({"version": 1, "model_type": "qwen2_moe", "expert_widths": {"1": [268435456, 0, 1, 2, 3, 4]}})),
        Just(json!("qwen2_moe_ragged")),
        Just(json!("qwen3_moe")),
        any::<u32>().prop_map(|v| json!(v)),
        ".{0,12}".prop_map(|v| json!(v)),
    ]
}

fn config_keys() -> Vec<String> {
    let mut keys: Vec<String> = model().config.as_object().unwrap().keys().cloned().collect();
    keys.extend(
        ["rope_scaling", "rope_theta", "head_dim", "moe_ragged", "num_local_experts", "torch_dtype"].map(String::from),
    );
    keys.extend(["attention_bias", "quantization_config"].map(String::from));
    keys
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn garbage_weights(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        exercise(model().config.to_string().as_bytes(), &[("model.safetensors", &bytes)]);
    }

    #[test]
    fn garbage_after_a_plausible_header_length(text in "[\\[\\]{}\":,a-z0-9_]{0,60}", data in 0usize..20) {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes());
        bytes.resize(bytes.len() + data, 1);
        exercise(model().config.to_string().as_bytes(), &[("model.safetensors", &bytes)]);
    }

    #[test]
    fn mutated_headers(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in any::<Option<prop::sample::Index>>()) {
        static WEIGHTS: OnceLock<Vec<u8>> = OnceLock::new();
        let mut bytes = WEIGHTS.get_or_init(|| model().weights()).clone();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (place, byte) in &edits {
            bytes[place.index(header)] = *byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(model().config.to_string().as_bytes(), &[("model.safetensors", &bytes)]);
    }

    #[test]
    fn mutated_header_numbers(name in any::<prop::sample::Index>(), field in 0usize..4, value in hostile_value()) {
        let bytes = model().weights();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let names: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
        let entry = &mut json[name.get(&names)];
        match field {
            0 => entry["shape"] = value,
            1 => entry["data_offsets"] = value,
            2 => entry["dtype"] = value,
            _ => entry["shape"] = json!([value]),
        }
        let text = json.to_string();
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.bytes());
        file.extend(&bytes[8 + header..]);
        exercise(model().config.to_string().as_bytes(), &[("model.safetensors", &file)]);
    }

    #[test]
    fn mutated_configs(edits in proptest::collection::vec((any::<prop::sample::Index>(), hostile_value()), 1..4), whole in any::<bool>()) {
        let mut config = model().config.clone();
        let keys = config_keys();
        for (key, value) in edits {
            config[key.get(&keys)] = value;
        }
        let _ = ModelConfig::from_json(&config, Some(&config));
        if whole {
            exercise(config.to_string().as_bytes(), &[("model.safetensors", &model().weights())]);
        }
    }

    #[test]
    fn garbage_configs(text in "[\\[\\]{}\":,a-z0-9_]{0,80}") {
        exercise(text.as_bytes(), &[("model.safetensors", &[])]);
    }

    #[test]
    fn mutated_indices(name in ".{0,20}", shard in ".{0,20}", value in hostile_value(), field in 0usize..3) {
        let mut index = json!({"metadata": {}, "weight_map": {}});
        for tensor in model().tensors.keys() {
            index["weight_map"][tensor] = json!("a.safetensors");
        }
        match field {
            0 => index["weight_map"][&name] = json!(shard),
            1 => index["weight_map"][&name] = value,
            _ => index["weight_map"] = value,
        }
        let config = model().config.to_string();
        exercise(config.as_bytes(), &[("model.safetensors.index.json", index.to_string().as_bytes()), ("a.safetensors", &model().weights())]);
    }
}

#[test]
fn the_unmutated_model_is_exercised_wholly() {
    assert!(exercise(model().config.to_string().as_bytes(), &[("model.safetensors", &model().weights())]));
}
