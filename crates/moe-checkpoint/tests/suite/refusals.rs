//! Every way in which a checkpoint can be wrong is refused by name, before any weight is read.

use crate::common;

use std::fs;
use std::path::Path;

use common::{Model, Tensor, assert_parts, copy_dir, fixture, message};
use moe_checkpoint::{Checkpoint, Dtype, Error, LayerRole, Role};
use serde_json::{Value, json};
use tempfile::TempDir;

fn qwen2() -> Model {
    Model::load(&fixture("tf4/qwen2_moe"))
}

fn refused(edit: impl Fn(&mut Value)) -> String {
    let mut model = qwen2();
    edit(&mut model.config);
    model.refusal()
}

#[test]
fn directories() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nowhere");
    assert_parts(&message(Checkpoint::open(&missing)), &["nowhere", "not a directory"]);
    assert_parts(&message(Checkpoint::open(dir.path())), &["config.json"]);
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_parts(&message(Checkpoint::open(dir.path())), &["config.json", "not valid JSON", "line 1"]);
    fs::write(dir.path().join("config.json"), "[]").unwrap();
    assert_parts(&message(Checkpoint::open(dir.path())), &["config.json", "a JSON object"]);
    fs::write(dir.path().join("config.json"), qwen2().config.to_string()).unwrap();
    assert_parts(&message(Checkpoint::open(dir.path())), &["no weights", "model.safetensors.index.json"]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
}

#[test]
fn families() {
    let known = "qwen2_moe, qwen3_moe";
    assert_parts(&refused(|c| c["model_type"] = json!("dbrx")), &["config.json", "`dbrx`", known]);
    assert_parts(&refused(|c| c["model_type"] = Value::Null), &["`model_type` is missing", known]);
    let llama = ModelConfigOf(json!({"model_type": "llama", "hidden_size": 32}));
    assert_parts(&llama.refusal(), &["not a Mixture-of-Experts model", "`llama`", known]);
    assert_parts(
        &refused(|c| c["num_experts"] = json!(0)),
        &["not a Mixture-of-Experts model", "all 3 layers are dense"],
    );
    assert_parts(&refused(|c| c["mlp_only_layers"] = json!([0, 1, 2])), &["not a Mixture-of-Experts model"]);
    assert_parts(
        &refused(|c| c["decoder_sparse_step"] = json!(4)),
        &["all 3 layers are dense", "`decoder_sparse_step` 4"],
    );
}

#[test]
fn generation_configs() {
    let dir = tempfile::tempdir().unwrap();
    qwen2().save(dir.path());
    for (text, parts) in [
        (r#"{"eos_token_id": "x"}"#, &["generation_config.json: field `eos_token_id` is \"x\""][..]),
        ("[1]", &["generation_config.json", "a JSON object"]),
        ("{", &["generation_config.json", "not valid JSON"]),
    ] {
        fs::write(dir.path().join("generation_config.json"), text).unwrap();
        assert_parts(&message(Checkpoint::open(dir.path())), parts);
    }
}

struct ModelConfigOf(Value);

impl ModelConfigOf {
    fn refusal(&self) -> String {
        Model { config: self.0.clone(), ..qwen2() }.refusal()
    }
}

#[test]
fn config_fields() {
    let cases: &[(&str, Value, &[&str])] = &[
        ("hidden_size", Value::Null, &["`hidden_size` is missing"]),
        ("hidden_size", json!("32"), &["`hidden_size` is \"32\""]),
        ("hidden_size", json!(-1), &["`hidden_size` is -1"]),
        ("hidden_size", json!(1u64 << 60), &["`hidden_size`", "integer from 1"]),
        ("num_hidden_layers", json!(1_000_000_000), &["`num_hidden_layers`"]),
        ("num_experts", json!(1_000_000_000), &["`num_experts`"]),
        ("num_key_value_heads", json!(3), &["`num_key_value_heads` is 3", "divisor"]),
        ("num_attention_heads", json!(64), &["`num_attention_heads` is 64", "at most `hidden_size` = 32"]),
        ("head_dim", json!(7), &["`head_dim` is 7", "even"]),
        ("hidden_act", json!("relu2"), &["`hidden_act` is \"relu2\"", "silu", "gelu_pytorch_tanh"]),
        ("num_experts_per_tok", json!(9), &["`num_experts_per_tok` is 9", "from 1 to 8"]),
        ("rms_norm_eps", json!(0), &["`rms_norm_eps` is 0", "above 0"]),
        ("tie_word_embeddings", json!(1), &["`tie_word_embeddings` is 1", "true or false"]),
        ("rope_scaling", json!({"type": "longrope"}), &["`rope_scaling.type` is \"longrope\"", "yarn"]),
        ("rope_scaling", json!({"rope_type": "linear"}), &["`rope_scaling.factor` is missing"]),
        ("rope_parameters", json!({"partial_rotary_factor": 0.5}), &["`rope_parameters.partial_rotary_factor`"]),
        ("layer_types", json!(["full_attention"]), &["`layer_types`", "3 entries, not 1"]),
        ("layer_types", json!(vec!["linear_attention"; 3]), &["`layer_types`", "sliding_attention"]),
        ("layer_types", json!(vec!["sliding_attention"; 3]), &["`sliding_window`", "use_sliding_window"]),
        ("eos_token_id", json!("</s>"), &["`eos_token_id`", "token id"]),
        ("mlp_only_layers", json!([0, "x"]), &["`mlp_only_layers`", "list of integers"]),
    ];
    for (field, value, parts) in cases {
        let text = refused(|c| c[*field] = value.clone());
        assert_parts(&text, parts);
        assert_parts(&text, &["config.json"]);
    }
    // Weights that are plain are read whatever the config remembers: see held.rs.
    let mut model = qwen2();
    model.config["quantization_config"] = json!({"quant_method": "fp8"});
    let name = "model.layers.0.self_attn.q_proj.weight";
    let tensor = model.tensor(name);
    (tensor.dtype, tensor.bytes) = (Dtype::U8, vec![0; tensor.shape.iter().product()]);
    assert_parts(&model.refusal(), &["quantized weights", "\"fp8\"", "not read", "weight_block_size"]);
}

#[test]
fn configs_that_contradict_the_tensors() {
    assert_parts(
        &refused(|c| c["hidden_size"] = json!(64)),
        &["model.embed_tokens.weight", "[97, 32]", "[97, 64]", "`hidden_size`"],
    );
    assert_parts(&refused(|c| c["vocab_size"] = json!(98)), &["`vocab_size`", "[98, 32]"]);
    for experts in [7, 9] {
        let expected = format!("[{experts}, 32]");
        assert_parts(
            &refused(|c| c["num_experts"] = json!(experts)),
            &["model.layers.0.mlp.gate.weight", "[8, 32]", &expected, "num_experts"],
        );
    }
    let text = refused(|c| c["moe_intermediate_size"] = json!(20));
    assert_parts(
        &text,
        &["model.layers.0.mlp.experts.0.gate_proj.weight", "[24, 32]", "[20, 32]", "moe_intermediate_size"],
    );
    let text = refused(|c| c["shared_expert_intermediate_size"] = json!(8));
    assert_parts(&text, &["mlp.shared_expert.gate_proj.weight", "`shared_expert_intermediate_size`"]);
    assert_parts(
        &refused(|c| c["num_key_value_heads"] = json!(4)),
        &["self_attn.k_proj.weight", "`num_key_value_heads`"],
    );
    assert_parts(
        &refused(|c| c["num_hidden_layers"] = json!(4)),
        &["model.layers.3.input_layernorm.weight", "is missing"],
    );
    assert_parts(
        &refused(|c| c["num_hidden_layers"] = json!(2)),
        &["model.layers.2.", "`num_hidden_layers` in config.json is 2"],
    );
    assert_parts(
        &refused(|c| c["mlp_only_layers"] = json!([1])),
        &["model.layers.1.mlp.gate_proj.weight", "is missing"],
    );
    assert_parts(&refused(|c| c["qkv_bias"] = json!(false)), &["self_attn.k_proj.bias", "no place for it"]);
    // The wrong head_dim default of a config that leaves it out shows in the projections.
    let mut model = Model::load(&fixture("tf5/qwen3_moe"));
    model.config["head_dim"] = Value::Null;
    assert_parts(&model.refusal(), &["self_attn.q_proj.weight", "[48, 32]", "[32, 32]", "`head_dim`"]);
}

#[test]
fn tensors() {
    let router = "model.layers.1.mlp.gate.weight";
    let expert = "model.layers.1.mlp.experts.7.up_proj.weight";
    for name in [router, expert, "lm_head.weight", "model.layers.2.self_attn.v_proj.bias"] {
        let mut model = qwen2();
        model.tensors.remove(name);
        assert_parts(&model.refusal(), &[&format!("tensor `{name}` is missing"), "config.json"]);
    }
    let mut model = qwen2();
    model.tensor(expert).shape.reverse();
    assert_parts(&model.refusal(), &[expert, "[32, 24]", "[24, 32]"]);
    let mut model = qwen2();
    model.tensor(expert).dtype = Dtype::I32;
    assert_parts(&model.refusal(), &[expert, "I32", "F32, F16 or BF16"]);
    let mut model = qwen2();
    *model.tensor(expert) = Tensor { dtype: Dtype::F8_E4M3, shape: vec![24, 32], bytes: vec![0; 24 * 32] };
    assert_parts(&model.refusal(), &[expert, "F8_E4M3", "not read"]);
    let mut model = qwen2();
    let surplus = model.tensor(expert).clone();
    model.tensors.insert("model.layers.1.mlp.experts.8.up_proj.weight".to_string(), surplus.clone());
    assert_parts(&model.refusal(), &["experts.8.up_proj.weight", "no place for it in layer 1"]);
    // Constants of old files, and tensors outside the decoder layers, are carried along.
    let mut model = qwen2();
    model.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_string(), surplus.clone());
    model.tensors.insert("value_head.weight".to_string(), surplus);
    assert!(model.open().1.is_ok());
}

#[test]
fn expert_layouts() {
    let mut model = qwen2();
    let names: Vec<String> =
        model.tensors.keys().filter(|n| n.starts_with("model.layers.1.mlp.experts.")).cloned().collect();
    names.iter().for_each(|name| drop(model.tensors.remove(name)));
    assert_parts(
        &model.refusal(),
        &["layer 1", "no known layout", "experts.0.gate_proj.weight", "experts.gate_up_proj"],
    );
    // Ragged tensors under a stock model_type would load with random experts elsewhere.
    let flat = Tensor { dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] };
    model.tensors.insert("model.layers.1.mlp.experts.ragged_down".to_string(), flat);
    assert_parts(&model.refusal(), &["layer 1", "no known layout"]);

    let mut model = qwen2();
    let per_expert = model.tensors.clone();
    model.fuse();
    let name = "model.layers.0.mlp.experts.0.down_proj.weight";
    model.tensors.insert(name.to_string(), per_expert[name].clone());
    assert_parts(&model.refusal(), &["layer 0", "gate_proj.weight` and `", "exactly one layout"]);
    model.tensors.remove(name);
    model.tensor("model.layers.0.mlp.experts.gate_up_proj").shape = vec![8, 32, 48];
    assert_parts(&model.refusal(), &["experts.gate_up_proj", "[8, 32, 48]", "[8, 48, 32]"]);
}

fn sharded() -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&fixture("tf5/qwen3_moe_sharded"), dir.path());
    let index = serde_json::from_slice(&fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    (dir, index)
}

fn refused_index(dir: &Path, index: &Value) -> (Error, String) {
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let error = Checkpoint::open(dir).unwrap_err();
    let text = error.to_string();
    (error, text)
}

#[test]
fn indices() {
    let (dir, index) = sharded();
    let first = "model-00001-of-00006.safetensors";

    fs::rename(dir.path().join(first), dir.path().join("away")).unwrap();
    let (error, text) = refused_index(dir.path(), &index);
    assert!(matches!(error, Error::MissingShard { .. }));
    assert_parts(&text, &["model.safetensors.index.json", first, "lm_head.weight"]);
    fs::rename(dir.path().join("away"), dir.path().join(first)).unwrap();

    let mut edited = index.clone();
    edited["weight_map"]["model.extra"] = json!(first);
    let (error, text) = refused_index(dir.path(), &edited);
    assert!(matches!(error, Error::IndexTensorAbsent { .. }));
    assert_parts(&text, &["`model.extra`", first]);

    let mut edited = index.clone();
    edited["weight_map"]["lm_head.weight"] = json!("model-00002-of-00006.safetensors");
    let (error, text) = refused_index(dir.path(), &edited);
    assert!(matches!(error, Error::IndexTensorAbsent { .. }));
    assert_parts(&text, &["`lm_head.weight`", "model-00002"]);

    for outside in ["../model.safetensors", "/etc/passwd", "", "a/../../b.safetensors", "."] {
        let mut edited = index.clone();
        edited["weight_map"]["lm_head.weight"] = json!(outside);
        let (error, text) = refused_index(dir.path(), &edited);
        assert!(matches!(error, Error::ShardOutsideDirectory { .. }), "{text}");
        assert_parts(&text, &["`lm_head.weight`", "inside the model directory"]);
    }

    fs::copy(dir.path().join(first), dir.path().join("copy.safetensors")).unwrap();
    // A file that the index does not name is never opened.
    refused_index_none(dir.path(), &index);
    let mut edited = index.clone();
    edited["weight_map"]["model.embed_tokens.weight"] = json!("copy.safetensors");
    // Of two copies the index decides which one counts; it has to.
    fs::write(dir.path().join("model.safetensors.index.json"), edited.to_string()).unwrap();
    let opened = Checkpoint::open(dir.path()).unwrap();
    assert!(opened.info("model.embed_tokens.weight").unwrap().file.ends_with("copy.safetensors"));
    assert!(opened.info("lm_head.weight").unwrap().file.ends_with(first));
    edited["weight_map"].as_object_mut().unwrap().remove("lm_head.weight");
    let (error, text) = refused_index(dir.path(), &edited);
    assert!(matches!(error, Error::TensorInTwoShards { .. }));
    assert_parts(&text, &["in two shards", "copy.safetensors", first]);

    assert_parts(&refused_index(dir.path(), &json!({})).1, &["index.json", "`weight_map` is missing"]);
    assert_parts(&refused_index(dir.path(), &json!({"weight_map": {}})).1, &["`weight_map` is {}"]);
    assert_parts(
        &refused_index(dir.path(), &json!({"weight_map": {"a": 1}})).1,
        &["`weight_map.a` is 1", "a file name"],
    );
}

fn refused_index_none(dir: &Path, index: &Value) {
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(dir.join("stray.safetensors"), "garbage").unwrap();
    assert!(Checkpoint::open(dir).is_ok());
}

#[test]
fn damaged_weight_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = qwen2();
    model.save(dir.path());
    let path = dir.path().join("model.safetensors");
    let whole = model.weights();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_parts(&error.to_string(), &["model.safetensors"]);
        error
    };
    assert!(matches!(open(&[]), Error::NoHeader { found: 0, .. }));
    assert!(matches!(open(&whole[..7]), Error::NoHeader { found: 7, .. }));
    assert!(matches!(open(&whole[..8]), Error::HeaderPastEnd { available: 0, .. }));
    assert!(matches!(open(&whole[..header]), Error::HeaderPastEnd { .. }));
    assert!(matches!(open(&whole[..8 + header]), Error::Truncated { .. }));
    assert!(matches!(open(&whole[..whole.len() - 1]), Error::Truncated { .. }));
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(open(&longer), Error::TrailingBytes { .. }));
    let mut claimed = whole.clone();
    claimed[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(open(&claimed), Error::HeaderPastEnd { claimed: u64::MAX, .. }));
    let mut garbled = whole.clone();
    garbled[8] = b'!';
    assert!(matches!(open(&garbled), Error::InvalidHeader { .. }));
    fs::write(&path, &whole).unwrap();
    assert!(Checkpoint::open(dir.path()).is_ok());
    // A truncated shard that the file system pads would be read as zeros; the length check sees the difference.
    let padded: Vec<u8> = whole[..whole.len() / 2].iter().copied().chain(std::iter::repeat_n(0, whole.len())).collect();
    assert!(matches!(open(&padded), Error::TrailingBytes { .. }));
}

#[test]
fn keys_of_other_layers_and_inputs_of_layers() {
    let changed = |key: &str, value: Value| {
        let mut model = Model::load(&fixture("tf5/gemma4_text_ple"));
        model.config[key] = value;
        model.refusal()
    };
    let shared = |count: usize| changed("num_kv_shared_layers", json!(count));
    assert_parts(&shared(4), &["num_kv_shared_layers", "below `num_hidden_layers` = 4"]);
    assert_parts(&shared(3), &["num_kv_shared_layers", "a layer of every kind in `layer_types` among the first 1"]);
    let key = "model.layers.1.self_attn.k_proj.weight";
    let mut without = Model::load(&fixture("tf5/gemma4_text_ple"));
    without.tensors.remove(key);
    assert_parts(&without.refusal(), &[key]);
    let width = changed("hidden_size_per_layer_input", json!(6));
    assert_parts(&width, &["per_layer", "hidden_size_per_layer_input"]);
    // What a config does not say is what transformers takes.
    let mut silent = Model::load(&fixture("tf5/gemma4_text_ple"));
    silent.config.as_object_mut().unwrap().remove("hidden_size_per_layer_input");
    assert_parts(&silent.refusal(), &["hidden_size_per_layer_input", "1024"]);
    let rows = changed("vocab_size_per_layer_input", json!(50));
    assert_parts(&rows, &["embed_tokens_per_layer", "vocab_size_per_layer_input"]);
    assert_parts(&changed("use_double_wide_mlp", json!(false)), &["model.layers.2.mlp"]);
}

#[test]
fn keys_that_nothing_reads_are_carried_along_and_belong_to_no_role() {
    let mut model = Model::load(&fixture("tf5/gemma4_text_ple"));
    let dead = "model.layers.2.self_attn.k_proj.weight";
    let bytes = vec![0; 4 * 16 * 16];
    model.tensors.insert(dead.into(), Tensor { dtype: Dtype::F32, shape: vec![16, 16], bytes });
    let (_dir, checkpoint) = model.open();
    let checkpoint = checkpoint.unwrap();
    assert!(checkpoint.tensors().any(|info| info.name == dead));
    let key = |layer| checkpoint.role(Role::Layer(layer, LayerRole::Key)).is_ok();
    assert_eq!([0, 1, 2, 3].map(key), [true, true, false, false]);
    assert!(checkpoint.plain_role(Role::Layer(2, LayerRole::Key)).is_err());
    assert!(checkpoint.plain_role(Role::Layer(2, LayerRole::Query)).is_ok());
}
