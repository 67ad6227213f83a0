//! The layout of ragged experts that the plugin of Less-is-MoE reads, against a directory made by hand as its
//! documentation says.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use moe_checkpoint::{
    Checkpoint, Dtype, Existing, ExpertPart, WriteOptions, is_flat_ragged, open_flat_ragged, write, write_flat_ragged,
};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Units that an expert keeps: other ones in every expert, none in one.
fn kept(layer: usize, expert: usize, width: usize) -> Vec<usize> {
    let keep = match (layer, expert) {
        (0, 1) => 0,
        _ => width - (3 * layer + 2 * expert) % width,
    };
    (0..keep).map(|unit| (unit * 5 + expert) % width).collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

fn stock() -> Checkpoint {
    stock_of("qwen3_moe")
}

fn stock_of(fixture: &str) -> Checkpoint {
    Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/tf5").join(fixture)).unwrap()
}

/// A directory in the plugin's layout: per layer the gate and up rows of each expert, then the down matrices, one after
/// the other.
fn by_hand(dir: &Path, change: impl Fn(&mut Value)) -> PathBuf {
    by_hand_of(dir, &stock(), "mlp.experts", "RaggedQwen3MoeForCausalLM", |config, sizes| {
        config["less_is_moe"] =
            json!({"format_version": 1, "weight_layout": "flat_gate_up_down_v1", "expert_intermediate_sizes": sizes});
        change(config);
    })
}

/// The same of any model whose experts are at `place` in their layer.
fn by_hand_of(
    dir: &Path,
    model: &Checkpoint,
    place: &str,
    architecture: &str,
    describe: impl Fn(&mut Value, &Value),
) -> PathBuf {
    let hidden = model.shape().hidden_size;
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut sizes = serde_json::Map::new();
    for layer in &model.shape().layers {
        let (mut gate_up, mut down, mut widths) = (Vec::new(), Vec::new(), Vec::new());
        let (mut gate_up_bias, mut down_bias) = (Vec::new(), Vec::new());
        for (expert, width) in layer.widths.iter().enumerate() {
            let weights = model.expert(layer.layer, expert).unwrap();
            let kept = kept(layer.layer, expert, *width);
            for matrix in [&weights.gate, &weights.up] {
                kept.iter().for_each(|unit| gate_up.extend(&matrix[unit * hidden..(unit + 1) * hidden]));
            }
            for row in 0..hidden {
                kept.iter().for_each(|unit| down.push(weights.down[row * width + unit]));
            }
            for bias in [&weights.gate_bias, &weights.up_bias].into_iter().flatten() {
                kept.iter().for_each(|unit| gate_up_bias.push(bias[*unit]));
            }
            down_bias.extend(weights.down_bias.iter().flat_map(|bias| bias.iter().copied()));
            widths.push(kept.len());
        }
        let experts = format!("model.layers.{}.{place}", layer.layer);
        if !down_bias.is_empty() {
            tensors.push((format!("{experts}.gate_up_proj_bias"), vec![gate_up_bias.len()], gate_up_bias));
            tensors.push((format!("{experts}.down_proj_bias"), vec![layer.num_experts(), hidden], down_bias));
        }
        tensors.push((format!("{experts}.gate_up_proj"), vec![gate_up.len()], gate_up));
        tensors.push((format!("{experts}.down_proj"), vec![down.len()], down));
        sizes.insert(layer.layer.to_string(), json!(widths));
    }
    for info in model.tensors().filter(|info| !info.name.contains(".experts.")) {
        let bytes = model.tensor_bytes(&info.name, 0..info.bytes as usize).unwrap();
        let mut values = Vec::new();
        assert!(moe_checkpoint::decode_f32(info.dtype, &bytes, &mut values));
        tensors.push((info.name.clone(), info.shape.clone(), values));
    }
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(.., values)| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let path = dir.join("flat");
    std::fs::create_dir_all(&path).unwrap();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    std::fs::write(path.join("model.safetensors"), safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
    let mut config = model.raw_config().clone();
    config["architectures"] = json!([architecture]);
    describe(&mut config, &Value::Object(sizes));
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    path
}

#[test]
fn a_directory_made_as_the_plugin_says_is_read_and_written_back() {
    let dir = tempfile::tempdir().unwrap();
    let flat = by_hand(dir.path(), |_| ());
    assert!(is_flat_ragged(&flat) && !is_flat_ragged(stock().dir()));
    let model = open_flat_ragged(&flat).unwrap();
    let (base, hidden) = (stock(), model.shape().hidden_size);
    assert!(model.ragged() && !model.fingerprint().is_empty());
    for layer in &base.shape().layers {
        for (expert, width) in layer.widths.iter().enumerate() {
            let kept = kept(layer.layer, expert, *width);
            let (whole, found) =
                (base.expert(layer.layer, expert).unwrap(), model.expert(layer.layer, expert).unwrap());
            let rows = |matrix: &[f32]| {
                kept.iter().flat_map(|u| matrix[u * hidden..(u + 1) * hidden].to_vec()).collect::<Vec<_>>()
            };
            assert_eq!((found.gate.to_vec(), found.up.to_vec()), (rows(&whole.gate), rows(&whole.up)));
            let down: Vec<f32> = (0..hidden)
                .flat_map(|row| kept.iter().map(move |u| (row, *u)))
                .map(|(r, u)| whole.down[r * width + u])
                .collect();
            assert_eq!(found.down.to_vec(), down);
        }
    }
    let (own, again) = there_and_back(dir.path(), &flat);
    assert!(own.expert_part(0, 0, ExpertPart::Gate).unwrap().is_some());
    assert!(write_flat_ragged(&own, &again, Existing::Refuse).is_err());
}

/// Into our own layout, and from there back to the very same bytes.
fn there_and_back(dir: &Path, flat: &Path) -> (Checkpoint, PathBuf) {
    let own = dir.join("own");
    write(&open_flat_ragged(flat).unwrap(), &own, &WriteOptions::default()).unwrap();
    let own = Checkpoint::open(own).unwrap();
    assert!(own.ragged());
    let again = dir.join("again");
    let written = write_flat_ragged(&own, &again, Existing::Refuse).unwrap();
    assert!(written.files.iter().all(|file| file.exists()));
    let json =
        |dir: &Path| -> Value { serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap() };
    assert_eq!(json(&again), json(flat));
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    let (first, second) = (bytes(flat), bytes(&again));
    let (first, second) = (
        safetensors::SafeTensors::deserialize(&first).unwrap(),
        safetensors::SafeTensors::deserialize(&second).unwrap(),
    );
    assert_eq!(first.len(), second.len());
    for (name, view) in first.tensors() {
        let found = second.tensor(&name).unwrap();
        assert!(found.shape() == view.shape() && found.data() == view.data(), "{name}");
    }
    (own, again)
}

#[test]
fn experts_with_biases_or_another_activation_are_described_as_version_two_says() {
    for (fixture, place, architecture, activation, bias) in [
        ("gpt_oss", "mlp.experts", "RaggedGptOssForCausalLM", "swigluoai", true),
        ("gemma4_text", "experts", "RaggedGemma4ForCausalLM", "gelu_tanh", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let base = stock_of(fixture);
        let made = |change: &dyn Fn(&mut Value)| {
            by_hand_of(dir.path(), &base, place, architecture, |config, sizes| {
                config["less_is_moe"] = json!({
                    "format_version": 2, "weight_layout": "flat_gate_up_down_v2", "expert_intermediate_sizes": sizes,
                    "expert_options": {"activation": activation, "bias": bias},
                });
                change(config);
            })
        };
        for (field, value) in [
            ("format_version", json!(1)),
            ("weight_layout", json!("flat_gate_up_down_v1")),
            ("expert_options", json!({"activation": "silu", "bias": bias})),
        ] {
            let flat = made(&|config| config["less_is_moe"][field] = value.clone());
            let error = open_flat_ragged(flat).unwrap_err().to_string();
            assert!(error.contains(field), "{fixture}: {error}");
        }
        let flat = made(&|_| ());
        let model = open_flat_ragged(&flat).unwrap();
        for layer in &base.shape().layers {
            for (expert, width) in layer.widths.iter().enumerate() {
                let kept = kept(layer.layer, expert, *width);
                let (whole, found) =
                    (base.expert(layer.layer, expert).unwrap(), model.expert(layer.layer, expert).unwrap());
                let of_kept = |bias: &[f32]| kept.iter().map(|unit| bias[*unit]).collect::<Vec<_>>();
                assert_eq!(whole.up_bias.as_deref().map(of_kept), found.up_bias.as_deref().map(<[f32]>::to_vec));
                assert_eq!(whole.down_bias.as_deref(), found.down_bias.as_deref(), "{fixture}, {expert}");
                assert_eq!(found.down_bias.is_some(), bias, "also where an expert has no unit");
            }
        }
        there_and_back(dir.path(), &flat);
    }
}

#[test]
fn what_the_layout_cannot_hold_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = write_flat_ragged(&stock(), dir.path().join("x"), Existing::Refuse).unwrap_err().to_string();
    assert!(error.contains("ragged checkpoint"), "{error}");
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 5] = [
        (|config| config["less_is_moe"]["format_version"] = json!(2), "format_version"),
        (|config| config["less_is_moe"]["weight_layout"] = json!("flat"), "weight_layout"),
        (|config| config["model_type"] = json!("mixtral"), "model_type"),
        (|config| config["less_is_moe"]["expert_intermediate_sizes"]["0"][0] = json!(1), "ragged_gate_up"),
        (
            |config| drop(config["less_is_moe"].as_object_mut().unwrap().remove("expert_intermediate_sizes")),
            "expert_intermediate_sizes",
        ),
    ];
    for (change, message) in changes {
        let error = open_flat_ragged(by_hand(dir.path(), change)).unwrap_err().to_string();
        assert!(error.contains(message), "{message}: {error}");
    }
}
