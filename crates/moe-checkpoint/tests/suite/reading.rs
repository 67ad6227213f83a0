//! Reading: every bundled checkpoint, every layout and dtype, against the `safetensors` crate.

use crate::common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Model, Tensor, assert_parts, fixture, fixtures, message};
use moe_checkpoint::{
    Checkpoint, Dtype, ExpertLayout, ExpertWeights, Ffn, LayerRole, LayerSite, ModelConfig, QkNorm, Role, RopeScaling,
    RoutingKind, ragged_config,
};
use serde_json::json;

fn f32s(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype {
        Dtype::F32 => tensor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => tensor.bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_fixture_reads_as_the_safetensors_crate_reads_it() {
    for dir in fixtures() {
        let model = Model::load(&dir);
        let checkpoint = Checkpoint::open(&dir).unwrap_or_else(|error| panic!("{error}"));
        let names: Vec<&str> = checkpoint.tensors().map(|info| info.name.as_str()).collect();
        assert_eq!(names, model.tensors.keys().collect::<Vec<_>>(), "{}", dir.display());
        for (name, tensor) in &model.tensors {
            let info = checkpoint.info(name).unwrap();
            assert_eq!((info.dtype, &info.shape), (tensor.dtype, &tensor.shape));
            assert_eq!(checkpoint.bytes(name).unwrap(), tensor.bytes);
            // Tables of experts hold whole numbers.
            if checkpoint.quantization().is_none() && tensor.dtype != Dtype::I64 {
                assert_eq!(checkpoint.tensor_f32(name).unwrap(), f32s(tensor));
            }
        }
        checkpoint.release();
        assert_eq!(checkpoint.bytes_on_disk(), model.tensors.values().map(|t| t.bytes.len() as u64).sum::<u64>());
        assert_eq!(checkpoint.raw_config(), &model.config);
        assert!(!checkpoint.ragged());
        if checkpoint.quantization().is_some() {
            continue;
        }
        for layer in &checkpoint.shape().layers {
            for (expert, width) in layer.widths.iter().enumerate() {
                let weights = checkpoint.expert(layer.layer, expert).unwrap();
                let (gate, up, down) = canonical(&model, layer.layer, expert);
                assert_eq!((weights.width, weights.hidden), (*width, checkpoint.config().expert_hidden_size()));
                assert_eq!((&weights.gate, &weights.up, &weights.down), (&gate, &up, &down), "{}", dir.display());
            }
        }
    }
}

fn shape3(tensor: &Tensor) -> [usize; 3] {
    tensor.shape[..].try_into().unwrap()
}

/// Gate, up and down of an expert, found by the names and shapes that each family documents.
fn canonical(model: &Model, layer: usize, expert: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    // Two layers are one of the files.
    let layer = if model.config["model_type"] == "longcat_flash" { layer / 2 } else { layer };
    let prefixes = ["model.", "model.language_model.", "language_model.model.", "backbone.", "thinker.model.", ""];
    let tensor =
        |name: String| prefixes.iter().find_map(|prefix| model.tensors.get(&format!("{prefix}layers.{layer}.{name}")));
    for (block, [gate, up, down]) in [
        ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("block_sparse_moe", ["w1", "w3", "w2"]),
        ("feed_forward", ["w1", "w3", "w2"]),
        ("ffn", ["w1", "w3", "w2"]),
        // without a gate, the up projection is the gate, too
        ("mixer", ["up_proj", "up_proj", "down_proj"]),
    ] {
        let part = |part: &str| tensor(format!("{block}.experts.{expert}.{part}.weight")).map(f32s);
        if let (Some(gate), Some(up), Some(down)) = (part(gate), part(up), part(down)) {
            return (gate, up, down);
        }
    }
    // a stack of the experts' matrices
    let stack = |part: &str| {
        let matrices = tensor(format!("moe.{part}.weight"))?;
        let [_, rows, cols] = shape3(matrices);
        Some(f32s(matrices)[expert * rows * cols..][..rows * cols].to_vec())
    };
    if let (Some(gate), Some(up), Some(down)) = (stack("gate_proj"), stack("up_proj"), stack("down_proj")) {
        return (gate, up, down);
    }
    let block = ["block_sparse_moe", "mlp"]
        .into_iter()
        .find_map(|block| Some((block, tensor(format!("{block}.input_linear.weight"))?)));
    if let Some((block, fused)) = block {
        let [_, both, hidden] = fused.shape[..] else { panic!() };
        let values = f32s(fused);
        let ours = &values[expert * both * hidden..][..both * hidden];
        let down = f32s(tensor(format!("{block}.output_linear.weight")).unwrap());
        let size = both / 2 * hidden;
        return (ours[..size].to_vec(), ours[size..].to_vec(), down[expert * size..][..size].to_vec());
    }
    // by block: that of most families, Llama 4's, and Gemma 4's, which is the layer itself
    let in_block = |name: &str| ["mlp.", "feed_forward.", ""].iter().find_map(|block| tensor(format!("{block}{name}")));
    let fused = in_block("experts.gate_up_proj").unwrap();
    if tensor("mlp.experts.gate_up_proj_bias".into()).is_none() {
        let stored = in_block("experts.down_proj").unwrap();
        let (all, down) = (f32s(fused), f32s(stored));
        let ([_, first, second], [_, rows, cols]) = (shape3(fused), shape3(stored));
        let size = rows * cols;
        let (all, down) = (&all[expert * 2 * size..][..2 * size], &down[expert * size..][..size]);
        if (first, second) == (2 * cols, rows) {
            return (all[..size].to_vec(), all[size..].to_vec(), down.to_vec());
        }
        // transposed: rows of down are units
        let (width, hidden) = (rows, cols);
        let column = |unit: usize| (0..hidden).map(move |h| all[h * 2 * width + unit]);
        let [gate, up] = [0, width].map(|start| (start..start + width).flat_map(column).collect());
        return (gate, up, (0..size).map(|i| down[i % width * hidden + i / width]).collect());
    }
    let [_, hidden, both] = fused.shape[..] else { panic!() };
    let (values, width) = (f32s(fused), both / 2);
    let at = |unit: usize, h: usize, which: usize| values[(expert * hidden + h) * both + 2 * unit + which];
    let part = |which| (0..width).flat_map(move |unit| (0..hidden).map(move |h| (unit, h, which)));
    let [gate, up] = [0, 1].map(|which| part(which).map(|(unit, h, which)| at(unit, h, which)).collect());
    let down = (0..hidden).flat_map(|h| (0..width).map(move |unit| (unit, h)));
    let values = f32s(tensor("mlp.experts.down_proj".into()).unwrap());
    (gate, up, down.map(|(unit, h)| values[(expert * width + unit) * hidden + h]).collect())
}

#[test]
fn fused_and_per_expert_layouts_give_the_same_experts_in_every_dtype() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for name in ["tf4/qwen2_moe", "tf5/qwen2_moe_mixed", "tf5/qwen3_moe"] {
            let mut model = Model::load(&fixture(name));
            model.cast(dtype);
            let (_one, per_expert) = model.open();
            model.fuse();
            let (_two, fused) = model.open();
            let (per_expert, fused) = (per_expert.unwrap(), fused.unwrap());
            assert_eq!(per_expert.parameters(), fused.parameters());
            for layer in &per_expert.shape().layers {
                assert_eq!(fused.expert_layout(layer.layer).unwrap(), ExpertLayout::Fused);
                for expert in 0..layer.num_experts() {
                    assert_eq!(
                        per_expert.expert(layer.layer, expert).unwrap(),
                        fused.expert(layer.layer, expert).unwrap()
                    );
                    let (a, b) = (
                        per_expert.expert_bytes(layer.layer, expert).unwrap(),
                        fused.expert_bytes(layer.layer, expert).unwrap(),
                    );
                    for (a, b) in [(a.gate, b.gate), (a.up, b.up), (a.down, b.down)] {
                        assert_eq!((&a.bytes, a.dtype, a.rows, a.cols), (&b.bytes, dtype, b.rows, b.cols));
                        assert_eq!(a.row(a.rows - 1), b.row(b.rows - 1));
                        assert_eq!(a.row(a.rows), None);
                    }
                    fused.release_expert(layer.layer, expert).unwrap();
                }
            }
        }
    }
}

/// A ragged copy of a fixture: expert `e` keeps its first `widths[e]` units.
fn ragged(name: &str, widths: &[usize]) -> (Model, Model) {
    let original = Model::load(&fixture(name));
    let mut model = original.clone();
    let mut by_layer = BTreeMap::new();
    for (layer, experts) in original.expert_layers() {
        assert_eq!(experts, widths.len());
        let prefix = format!("model.layers.{layer}.mlp.experts");
        let (mut gate_up, mut down, mut hidden) = (Vec::new(), Vec::new(), 0);
        for (expert, width) in widths.iter().enumerate() {
            for part in ["gate", "up"] {
                let tensor = model.tensors.remove(&format!("{prefix}.{expert}.{part}_proj.weight")).unwrap();
                hidden = tensor.shape[1];
                gate_up.extend_from_slice(&tensor.bytes[..width * hidden * 4]);
            }
            let tensor = model.tensors.remove(&format!("{prefix}.{expert}.down_proj.weight")).unwrap();
            for row in tensor.bytes.chunks(tensor.shape[1] * 4) {
                down.extend_from_slice(&row[..width * 4]);
            }
        }
        let units: usize = widths.iter().sum();
        let dtype = Dtype::F32;
        let gate_up = Tensor { dtype, shape: vec![2 * units, hidden], bytes: gate_up };
        model.tensors.insert(format!("{prefix}.ragged_gate_up"), gate_up);
        model
            .tensors
            .insert(format!("{prefix}.ragged_down"), Tensor { dtype, shape: vec![hidden * units], bytes: down });
        by_layer.insert(layer, widths.to_vec());
    }
    model.config = ragged_config(&model.config, &by_layer, &BTreeSet::new()).unwrap();
    (original, model)
}

#[test]
fn ragged_experts_read_back() {
    let widths = [24, 0, 1, 7, 24, 3, 2, 5];
    let (original, model) = ragged("tf5/qwen3_moe", &widths);
    let (_dir, checkpoint) = model.open();
    let checkpoint = checkpoint.unwrap();
    assert!(checkpoint.ragged());
    assert_eq!(checkpoint.config().model_type, "qwen3_moe");
    assert_eq!(checkpoint.shape().layers[2].widths, widths);
    for (expert, width) in widths.iter().enumerate() {
        let weights = checkpoint.expert(1, expert).unwrap();
        let whole =
            |part: &str| f32s(&original.tensors[&format!("model.layers.1.mlp.experts.{expert}.{part}_proj.weight")]);
        assert_eq!(weights.width, *width);
        assert_eq!(weights.gate, whole("gate")[..width * 32]);
        assert_eq!(weights.up, whole("up")[..width * 32]);
        let down: Vec<f32> = whole("down").chunks(24).flat_map(|row| row[..*width].to_vec()).collect();
        assert_eq!(weights.down, down);
    }
}

#[test]
fn ragged_widths_that_contradict_the_tensors_are_refused() {
    let (_, mut model) = ragged("tf5/qwen3_moe", &[24, 0, 1, 7, 24, 3, 2, 5]);
    model.config["moe_ragged"]["expert_widths"]["2"][1] = json!(1);
    assert_parts(
        &model.refusal(),
        &["model.layers.2.mlp.experts.ragged_gate_up", "[132, 32]", "[134, 32]", "expert_widths"],
    );
    model.config["moe_ragged"]["expert_widths"]["2"] = json!([24, 0, 1, 7, 24, 3, 7]);
    assert_parts(&model.refusal(), &["model.layers.2.mlp.gate.weight", "[8, 32]", "[7, 32]"]);
}

#[test]
fn rows_tied_heads_and_reused_buffers() {
    let checkpoint = Checkpoint::open(fixture("tf5/qwen2_moe_mixed")).unwrap();
    let embedding = checkpoint.read_f32(Role::Embedding).unwrap();
    assert!(checkpoint.config().tie_word_embeddings);
    assert_eq!(checkpoint.read_f32(Role::LmHead).unwrap(), embedding);
    assert_eq!(checkpoint.read_f32_rows(Role::LmHead, 3..7).unwrap(), embedding[3 * 32..7 * 32]);
    assert!(checkpoint.read_f32_rows(Role::Embedding, 97..97).unwrap().is_empty());
    assert_parts(
        &message(checkpoint.read_f32_rows(Role::Embedding, 90..98)),
        &["model.embed_tokens.weight", "90..98", "0..97"],
    );
    // `layer_types` and the like are not the model's business here: layer 1 is the only MoE layer.
    assert_parts(&message(checkpoint.expert(0, 0)), &["layer 0", "[1]"]);
    assert_parts(&message(checkpoint.expert(1, 6)), &["expert 6", "6"]);
    assert_parts(
        &message(checkpoint.read_f32(Role::Layer(1, LayerRole::DenseUp))),
        &["model.layers.1.mlp.up_proj.weight"],
    );
    let mut buffer = ExpertWeights::default();
    for expert in [5, 0] {
        checkpoint.expert_into(1, expert, &mut buffer).unwrap();
        assert_eq!(buffer, checkpoint.expert(1, expert).unwrap());
    }
    // A tied head that is stored nevertheless counts once and is not read.
    let mut model = Model::load(&fixture("tf5/qwen2_moe_mixed"));
    let head = Tensor { bytes: vec![0; 97 * 32 * 4], ..model.tensor("model.embed_tokens.weight").clone() };
    model.tensors.insert("lm_head.weight".to_string(), head);
    let (_dir, with_head) = model.open();
    let with_head = with_head.unwrap();
    assert_eq!(with_head.parameters(), checkpoint.parameters());
    assert_eq!(with_head.read_f32(Role::LmHead).unwrap(), embedding);
}

#[test]
fn streaming_covers_a_tensor_in_order() {
    let checkpoint = Checkpoint::open(fixture("tf5/qwen3_moe_sharded")).unwrap();
    let mut bytes = Vec::new();
    let name = "model.embed_tokens.weight";
    checkpoint
        .stream(name, 1000, |slice| {
            assert!(slice.len() <= 1000);
            bytes.extend_from_slice(slice);
            Ok(())
        })
        .unwrap();
    assert_eq!(bytes, *checkpoint.bytes(name).unwrap());
}

#[test]
fn releasing_a_tensor_that_the_model_does_not_have_does_nothing() {
    for name in ["tf5/mixtral", "tf5/deepseek_v3_fp8"] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        checkpoint.release_range("no.such.tensor", 0..16);
        checkpoint.release_plain("no.such.tensor", 0..16);
    }
}

#[test]
fn the_fingerprint_is_of_the_content_and_not_of_the_files() {
    let mut model = Model::load(&fixture("tf5/qwen3_moe_sharded"));
    let sharded = Checkpoint::open(fixture("tf5/qwen3_moe_sharded")).unwrap().fingerprint();
    let (_dir, single) = model.open();
    assert_eq!(single.unwrap().fingerprint(), sharded);
    let last = model.tensor("model.norm.weight").bytes.last_mut().unwrap();
    *last ^= 1;
    let (_dir, changed) = model.open();
    assert_ne!(changed.unwrap().fingerprint(), sharded);
}

#[test]
fn configs_of_both_dialects() {
    let open = |name: &str| Checkpoint::open(fixture(name)).unwrap().config().clone();
    let config = open("tf4/qwen2_moe");
    assert_eq!(config, ModelConfig { ..open("tf5/qwen2_moe") });
    assert_eq!(config.routing.kind, RoutingKind::SoftmaxTopK { renormalize: false });
    assert_eq!((config.rope.theta, &config.rope.scaling), (10_000.0, &RopeScaling::Default));
    assert_eq!((config.eos_token_ids.as_slice(), config.dtype.as_deref()), (&[2][..], Some("float32")));
    assert!(config.attention.qkv_bias && !config.attention.output_bias && config.attention.qk_norm == QkNorm::None);
    assert!(
        config.moe(0).unwrap().shared.as_ref().is_some_and(|shared| shared.gated && shared.intermediate_size == 48)
    );

    assert_eq!(open("tf4/qwen3_moe"), open("tf5/qwen3_moe"));
    let config = open("tf5/qwen3_moe");
    assert_eq!(
        (config.attention.head_dim, config.attention.qk_norm, config.attention.qkv_bias),
        (12, QkNorm::Head, false)
    );
    assert_eq!(config.routing.kind, RoutingKind::SoftmaxTopK { renormalize: true });
    assert_eq!(config.moe(2).unwrap().shared, None);
    assert_eq!(open("tf5/qwen3_moe_long").attention.head_dim, 8);

    let config = open("tf5/qwen2_moe_mixed");
    let dense: Vec<bool> =
        config.layers.iter().map(|layer| matches!(layer.ffn, Ffn::Dense { intermediate_size: 40, .. })).collect();
    assert_eq!(dense, [true, false, true, true]);

    assert_eq!(open("tf5/qwen2_moe_linear").rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    assert_eq!(open("tf5/qwen3_moe_yarn").rope.scaling, yarn);

    let windows = |name: &str| open(name).layers.iter().map(|layer| layer.sliding_window).collect::<Vec<_>>();
    assert_eq!(windows("tf5/qwen2_moe_sliding"), [Some(6), None, None]);
    assert_eq!(windows("tf4/qwen2_moe_sliding"), [Some(6); 3]);
    assert_eq!(windows("tf5/qwen2_moe"), [None; 3]);
}

#[test]
fn old_spellings_of_config_fields() {
    let parse = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut config = Model::load(&fixture("tf4/qwen3_moe")).config;
        edit(&mut config);
        ModelConfig::from_json(&config, None)
    };
    let yarn = parse(&|c| c["rope_scaling"] = json!({"type": "yarn", "factor": 2, "beta_fast": 16, "truncate": false}))
        .unwrap();
    let RopeScaling::Yarn { factor, original_max_position, beta_fast, truncate, .. } = yarn.rope.scaling else {
        panic!()
    };
    assert_eq!((factor, original_max_position, beta_fast, truncate), (2.0, 128, 16.0, false));
    // Both dialects at once are fine if they agree.
    let both = |theta: f64, factor: f64| {
        parse(&move |c| {
            c["rope_parameters"] = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": theta});
            c["rope_scaling"] = json!({"type": "linear", "factor": factor});
        })
    };
    assert_eq!(both(10_000.0, 2.0).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_parts(&message(both(5.0, 2.0)), &["rope_parameters", "rope_theta"]);
    assert_parts(&message(both(10_000.0, 3.0)), &["rope_parameters", "rope_scaling"]);
    assert_eq!(parse(&|c| c["eos_token_id"] = json!([7, 9])).unwrap().eos_token_ids, [7, 9]);
    assert_eq!(
        parse(&|c| {
            c["torch_dtype"] = json!("bfloat16");
            c["dtype"] = json!(null)
        })
        .unwrap()
        .dtype
        .unwrap(),
        "bfloat16"
    );
    assert_parts(&message(parse(&|c| c["torch_dtype"] = json!("bfloat16"))), &["`dtype`", "`torch_dtype`"]);
    assert_parts(
        &message(parse(&|c| c["num_local_experts"] = json!(9))),
        &["num_experts", "8", "num_local_experts", "9"],
    );
    let generation = json!({"eos_token_id": [3, 4]});
    let config = Model::load(&fixture("tf4/qwen3_moe")).config;
    assert_eq!(ModelConfig::from_json(&config, Some(&generation)).unwrap().eos_token_ids, [3, 4]);
}

#[test]
fn a_tensor_is_one_linear_map_of_its_layer_however_a_family_calls_it() {
    for dir in fixtures() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for layer in 0..checkpoint.config().layers.len() {
            let mut seen = BTreeMap::new();
            for role in LayerSite::ALL.into_iter().flat_map(LayerSite::roles).copied() {
                let Ok(info) = checkpoint.plain_role(Role::Layer(layer, role)) else { continue };
                let other = seen.insert(info.name.clone(), role);
                assert!(other.is_none(), "{}: `{}` is {role:?} and {other:?}", dir.display(), info.name);
            }
        }
    }
}

#[test]
fn a_file_that_was_shortened_while_it_was_open_is_an_error_and_not_the_end_of_the_process() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("tf5/qwen2_moe")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let (checkpoint, whole) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(dir.path()).unwrap());
    let fingerprint = whole.fingerprint();
    let file = dir.path().join("model.safetensors");
    let length = std::fs::metadata(&file).unwrap().len();
    // Another file in its place leaves the one that is mapped as it was.
    std::fs::rename(&file, dir.path().join("kept")).unwrap();
    std::fs::write(&file, "short").unwrap();
    assert!(checkpoint.expert(0, 0).is_ok());
    std::fs::rename(dir.path().join("kept"), &file).unwrap();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(length / 2).unwrap();
    let expected =
        format!("model.safetensors: shortened while it was open: {} bytes, expected the {length}", length / 2);
    for tensor in checkpoint.tensors() {
        let error = message(checkpoint.bytes(&tensor.name));
        assert!(error.contains(&expected), "{error}");
    }
    assert!(message(checkpoint.expert(0, 0)).contains(&expected));
    assert_ne!(checkpoint.fingerprint(), fingerprint);
}
