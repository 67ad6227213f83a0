//! Nothing that a file can hold makes the reader panic or allocate what the file merely claims, and what it refuses it
//! names: for one model of every family and of every layout that routed experts have on disk.

#[allow(dead_code)]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Model, Tensor, fixture};
use moe_checkpoint::{
    Checkpoint, Dtype, ExpertBiases, ExpertLayout, ExpertPart, ExpertTensor, ModelConfig, Role, families, ragged_config,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Counts bytes, so that a size which was claimed and not checked shows.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    LARGEST.fetch_max(size, Ordering::Relaxed);
    PEAK.fetch_max(LIVE.fetch_add(size, Ordering::Relaxed) + size, Ordering::Relaxed);
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Files here have some hundred kilobytes, claims go to 2^64. Only the number of experts, of which a config may claim
/// 2^22, takes memory before a tensor has shown it.
fn assert_little_memory() {
    let (largest, peak) = (LARGEST.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed));
    assert!(largest <= 16 << 20, "one allocation of {largest} bytes");
    assert!(peak <= 256 << 20, "allocations of {peak} bytes together");
}

/// A model and its file.
struct Subject {
    name: String,
    model: Model,
    /// The weight file, and where its data begin.
    weights: Vec<u8>,
    data: usize,
    /// Places in the config: those it has, and those it might have.
    keys: Vec<Vec<String>>,
}

impl Subject {
    fn new(name: &str, model: Model) -> Self {
        let weights = model.weights();
        let data = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        Self { name: name.to_string(), keys: keys(&model.config), model, weights, data }
    }

    fn config(&self) -> String {
        self.model.config.to_string()
    }

    fn header(&self) -> Value {
        serde_json::from_slice(&self.weights[8..self.data]).unwrap()
    }

    /// Opens and reads the model with another weight file.
    fn with_weights(&self, weights: &[u8]) -> Result<Checkpoint, String> {
        exercise(self.config().as_bytes(), &[("model.safetensors", weights)])
    }
}

fn keys(config: &Value) -> Vec<Vec<String>> {
    let mut keys = Vec::new();
    for (key, value) in config.as_object().unwrap() {
        keys.push(vec![key.clone()]);
        for inner in value.as_object().into_iter().flat_map(|object| object.keys()) {
            keys.push(vec![key.clone(), inner.clone()]);
        }
    }
    let more = "rope_scaling rope_theta rope_parameters head_dim moe_ragged num_local_experts num_experts torch_dtype dtype \
                attention_bias quantization_config n_group topk_group num_nextn_predict_layers layer_types sliding_window \
                mlp_only_layers first_k_dense_replace n_shared_experts partial_rotary_factor tie_word_embeddings text_config";
    keys.extend(more.split_whitespace().map(|key| vec![key.to_string()]));
    keys
}

/// Whether a text has a key of the config, at any depth, between backticks.
fn names_a_field(text: &str, config: &Value) -> bool {
    let Value::Object(map) = config else { return false };
    map.iter().any(|(key, value)| {
        text.contains(&format!("`{key}`")) || text.contains(&format!(".{key}`")) || names_a_field(text, value)
    })
}

fn subjects() -> &'static [Subject] {
    static SUBJECTS: OnceLock<Vec<Subject>> = OnceLock::new();
    SUBJECTS.get_or_init(|| {
        let names = "tf4/qwen2_moe tf5/deepseek_v2_yarn tf5/deepseek_v3_yarn tf5/deepseek_v3_fp8 tf5/ernie4_5_moe tf5/glm4_moe \
                     tf5/gpt_oss tf5/gpt_oss_bf16 tf5/gpt_oss_mxfp4 tf5/granitemoe tf5/kimi_k2 tf5/mixtral_gelu_tanh \
                     tf5/moonlight tf5/olmoe tf5/phimoe_longrope tf5/qwen2_moe_mixed tf5/qwen3_moe_gelu \
                     tf5/dots1 tf5/exaone_moe tf5/glm4_moe_lite_group tf5/glm4v_moe_full tf5/hy_v3 tf5/kimi_k25_full tf5/minimax_m2 tf5/qwen3_next_mixed tf5/deepseek_v32 \
                     tf5/glm_moe_dsa tf5/mistral4 tf5/lfm2_moe tf5/longcat_flash tf5/deepseek_v4 tf5/deepseek_v4_saved \
                     tf5/afmoe tf5/flex_olmo tf5/gemma4_full tf5/gemma4_text_ple tf5/granitemoehybrid tf5/granitemoeshared \
                     tf5/hunyuan_v1_moe tf5/llama4_full tf5/nemotron_h tf5/nemotron_h_latent tf5/sarvam_moe tf5/cohere2_moe tf5/step3p7_full \
                     tf5/qwen3_omni_moe_thinker tf5/qwen3_vl_moe_full tf5/kimi_linear tf5/bailing_hybrid \
                     tf5/bailing_moe tf5/bailing_moe_v2 tf5/minimax tf5/jetmoe tf5/glm_moe_dsa_topk ../unrun/qwen3_5_moe \
                     ../unrun/qwen3_5_moe_text";
        let load = |name: &str| Model::load(&fixture(name));
        let mut subjects: Vec<_> = names.split_whitespace().map(|name| Subject::new(name, load(name))).collect();
        let mut fused = load("tf5/qwen2_moe_mixed");
        fused.fuse();
        subjects.push(Subject::new("fused", fused));
        subjects.push(Subject::new("ragged", ragged("tf5/qwen2_moe_mixed", &[])));
        subjects.push(Subject::new("ragged with a bias of down", ragged("tf5/qwen2_moe_mixed", &[1])));
        subjects.push(Subject::new("ragged with biases", ragged("tf5/gpt_oss_bf16", &[])));
        subjects
    })
}

/// A ragged copy whose experts keep fewer units, the later the fewer. Those of the layers `down_bias` get a bias of
/// down.
fn ragged(name: &str, down_bias: &[usize]) -> Model {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let mut model = Model::load(&fixture(name));
    model.tensors.retain(|name, _| !name.contains(".experts."));
    let (mut widths, hidden) = (BTreeMap::new(), checkpoint.config().hidden_size);
    for layer in &checkpoint.shape().layers {
        let kept: Vec<usize> = layer.widths.iter().enumerate().map(|(expert, width)| width - 3 * expert).collect();
        for (tensor, parts, columns) in [
            (ExpertTensor::RaggedGateUp, [ExpertPart::Gate, ExpertPart::Up].as_slice(), Some(hidden)),
            (ExpertTensor::RaggedGateUpBias, &[ExpertPart::GateBias, ExpertPart::UpBias], None),
            (ExpertTensor::RaggedDown, &[ExpertPart::Down], None),
            (ExpertTensor::RaggedDownBias, &[ExpertPart::DownBias], Some(hidden)),
        ] {
            let mut values = Vec::new();
            for (expert, kept) in kept.iter().enumerate() {
                let read = |part: &ExpertPart| checkpoint.expert_part(layer.layer, expert, *part).unwrap();
                for matrix in parts.iter().filter_map(read) {
                    let all = matrix.to_f32();
                    match tensor {
                        ExpertTensor::RaggedDown => {
                            values.extend(all.chunks(matrix.cols).flat_map(|row| &row[..*kept]))
                        }
                        ExpertTensor::RaggedDownBias => values.extend(all),
                        _ => values.extend(&all[..kept * matrix.cols]),
                    }
                }
            }
            if tensor == ExpertTensor::RaggedDownBias && down_bias.contains(&layer.layer) {
                values = vec![0.5; kept.len() * hidden];
            }
            if values.is_empty() {
                continue;
            }
            let shape = columns.map_or(vec![values.len()], |columns| vec![values.len() / columns, columns]);
            let mut bytes = Vec::new();
            assert!(moe_checkpoint::encode(Dtype::BF16, &values, &mut bytes));
            let name = checkpoint.expert_tensor_name(layer.layer, tensor);
            model.tensors.insert(name, Tensor { dtype: Dtype::BF16, shape, bytes });
        }
        widths.insert(layer.layer, kept);
    }
    model.config = ragged_config(&model.config, &widths, &down_bias.iter().copied().collect()).unwrap();
    model
}

/// Opens a directory with these files, reads everything if it opens, and says why if not.
fn exercise(config: &[u8], files: &[(&str, &[u8])]) -> Result<Checkpoint, String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let opened = Checkpoint::open(dir.path());
    if let Ok(checkpoint) = &opened {
        checkpoint.fingerprint();
        for tensor in checkpoint.tensors() {
            checkpoint.bytes(&tensor.name).unwrap();
            let _ = checkpoint.tensor_f32(&tensor.name);
        }
        checkpoint.read_f32(Role::LmHead).unwrap();
        for layer in &checkpoint.shape().layers {
            for expert in 0..layer.num_experts() {
                let weights = checkpoint.expert(layer.layer, expert).unwrap();
                assert_eq!(
                    checkpoint.expert_bytes(layer.layer, expert).unwrap().down.to_f32().len(),
                    weights.down.len()
                );
            }
        }
    }
    assert_little_memory();
    opened.map_err(|error| {
        let text = error.to_string();
        // A file of the directory, by its path or by its name.
        let named = files.iter().map(|(name, _)| *name).chain(["config.json", dir.path().to_str().unwrap()]);
        assert!(named.into_iter().any(|name| text.contains(name)), "no file is named: {text}");
        text
    })
}

fn hostile_value() -> impl Strategy<Value = Value> {
    let fixed = [
        Value::Null,
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(1 << 16),
        json!(1 << 28),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!(0.5),
        json!(true),
        json!([]),
        json!([u64::MAX, -1, "x"]),
        json!([1 << 28, 1 << 28]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 0, "original_max_position_embeddings": 0}),
        json!({"type": "yarn", "factor": 1e300, "mscale": -1, "mscale_all_dim": 1e300, "beta_fast": 0}),
        json!({"type": "longrope", "short_factor": [1], "long_factor": [], "original_max_position_embeddings": 1}),
        json!({"version": 1, "model_type": "qwen2_moe", "expert_widths": {"1": [268435456, 0, 1, 2, 3, 4]}}),
        json!({"quant_method": "fp8", "weight_block_size": [1 << 28, 1]}),
        json!({"quant_method": "mxfp4"}),
        json!("qwen2_moe_ragged"),
        json!("gpt_oss_ragged"),
        json!("gelu"),
        json!("float8_e4m3fn"),
    ];
    let families = families().iter().map(|family| json!(family.model_type()));
    let fixed: Vec<Value> = fixed.into_iter().chain(families).collect();
    prop_oneof![
        8 => prop::sample::select(fixed),
        1 => any::<u32>().prop_map(|v| json!(v)),
        1 => ".{0,12}".prop_map(|v| json!(v)),
    ]
}

fn subject() -> impl Strategy<Value = &'static Subject> {
    (0..subjects().len()).prop_map(|index| &subjects()[index])
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

proptest! {
    // About forty of every property for every subject.
    #![proptest_config(ProptestConfig { cases: 900, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_weights(subject in subject(), bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(subject.with_weights(&bytes).is_err());
    }

    #[test]
    fn garbage_after_a_plausible_header_length(
        subject in subject(), text in "[\\[\\]{}\":,a-z0-9_]{0,60}", data in 0usize..20,
    ) {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes());
        bytes.resize(bytes.len() + data, 1);
        prop_assert!(subject.with_weights(&bytes).is_err());
    }

    #[test]
    fn mutated_headers(
        subject in subject(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = subject.weights.clone();
        for (place, byte) in &edits {
            bytes[place.index(subject.data)] = *byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = subject.with_weights(&bytes);
    }

    #[test]
    fn mutated_header_numbers(
        subject in subject(), name in any::<prop::sample::Index>(), field in 0usize..5, value in hostile_value(),
    ) {
        let mut json = subject.header();
        let names: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
        let name = name.get(&names);
        let entry = &mut json[name];
        match field {
            0 => entry["shape"] = value,
            1 => entry["data_offsets"] = value,
            2 => entry["dtype"] = value,
            3 => entry["shape"] = json!([value]),
            _ => entry["shape"][0] = value,
        }
        let unchanged = json == subject.header();
        let text = json.to_string();
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.bytes());
        file.extend(&subject.weights[subject.data..]);
        match subject.with_weights(&file) {
            // Serde says where in the text a value has the wrong type; everything else is about a tensor.
            Err(text) => prop_assert!(text.contains(name.as_str()) || text.contains("invalid safetensors header"), "{text}"),
            // What holds one axis of a tensor that is carried along can be anything that fits.
            Ok(checkpoint) => prop_assert!(unchanged || checkpoint.info(name).is_ok()),
        }
    }

    #[test]
    fn mutated_configs(
        subject in subject(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), hostile_value()), 1..4),
        whole in any::<bool>(),
    ) {
        let mut config = subject.model.config.clone();
        for (key, value) in &edits {
            let mut place = &mut config;
            for key in key.get(&subject.keys) {
                // An earlier edit may have replaced the object.
                if !place.is_object() {
                    *place = json!({});
                }
                place = &mut place[key];
            }
            *place = value.clone();
        }
        if let Err(error) = ModelConfig::from_json(&config, Some(&config)) {
            let text = error.to_string();
            prop_assert!(text.contains("config.json") || text.contains("generation_config.json"), "{text}");
            let missing = text.contains("field `") && text.contains("is missing");
            let named = missing || text.contains("model_type") || names_a_field(&text, &config);
            prop_assert!(named, "no field is named: {text}");
        }
        if whole {
            let _ = exercise(config.to_string().as_bytes(), &[("model.safetensors", &subject.weights)]);
        }
        assert_little_memory();
    }

    #[test]
    fn garbage_configs(text in "[\\[\\]{}\":,a-z0-9_]{0,80}") {
        prop_assert!(exercise(text.as_bytes(), &[("model.safetensors", &[])]).is_err());
    }

    #[test]
    fn mutated_indices(
        subject in subject(), name in ".{0,20}", shard in ".{0,20}", value in hostile_value(), field in 0usize..4,
        moved in any::<prop::sample::Index>(),
    ) {
        let names: Vec<&String> = subject.model.tensors.keys().collect();
        let map: BTreeMap<_, _> = names.iter().map(|name| (*name, "a.safetensors")).collect();
        let mut index = json!({"metadata": {}, "weight_map": map});
        let moved = moved.get(&names).as_str();
        match field {
            0 => index["weight_map"][&name] = json!(shard),
            1 => index["weight_map"][&name] = value,
            2 => index["weight_map"][moved] = json!("b.safetensors"),
            _ => index["weight_map"] = value,
        }
        let files = [("model.safetensors.index.json", index.to_string()), ("b.safetensors", String::new())];
        let found = exercise(
            subject.config().as_bytes(),
            &[(files[0].0, files[0].1.as_bytes()), (files[1].0, &[]), ("a.safetensors", &subject.weights)],
        );
        prop_assert!(found.is_err(), "an index with a tensor, a shard or a file too many is refused");
    }
}

#[test]
fn unmutated_models_of_every_family_and_layout_are_exercised_wholly() {
    let (mut seen, mut layouts) = (BTreeSet::new(), BTreeSet::new());
    for subject in subjects() {
        let checkpoint =
            subject.with_weights(&subject.weights).unwrap_or_else(|error| panic!("{}: {error}", subject.name));
        seen.insert(checkpoint.config().model_type.clone());
        let text = checkpoint.family().text_config(checkpoint.raw_config());
        seen.extend(text["model_type"].as_str().map(str::to_string));
        for layer in &checkpoint.shape().layers {
            let biases = checkpoint.config().moe(layer.layer).unwrap().biases;
            let layout = checkpoint.expert_layout(layer.layer).unwrap();
            layouts.insert((layout, biases, checkpoint.quantization().is_some()));
        }
    }
    assert!(families().iter().all(|family| seen.contains(family.model_type())), "{seen:?}");
    let expected = [
        (ExpertLayout::PerExpert, ExpertBiases::None, false),
        (ExpertLayout::PerExpert, ExpertBiases::None, true),
        (ExpertLayout::Gateless, ExpertBiases::None, false),
        (ExpertLayout::Fused, ExpertBiases::None, false),
        (ExpertLayout::Stacked, ExpertBiases::None, false),
        (ExpertLayout::Transposed, ExpertBiases::None, false),
        (ExpertLayout::Interleaved, ExpertBiases::All, false),
        (ExpertLayout::Interleaved, ExpertBiases::All, true),
        (ExpertLayout::Ragged, ExpertBiases::None, false),
        (ExpertLayout::Ragged, ExpertBiases::Down, false),
        (ExpertLayout::Ragged, ExpertBiases::All, false),
    ];
    assert_eq!(layouts, BTreeSet::from(expected));
}
