//! Checkpoints as people hold them: other names, wrappers, leftovers. What is one model opens with the same experts,
//! and what is none is answered with what it is.

use crate::common;

use std::fs;
use std::path::Path;

use common::{Model, Tensor, assert_parts, copy_dir, fixture, message};
use moe_checkpoint::{Checkpoint, Dtype, Role, UniformShape, uniform_shape_config};
use serde_json::{Value, json};

/// A copy whose tensors have other names.
fn renamed(model: &Model, name: impl Fn(&str) -> String) -> Model {
    let tensors = model.tensors.iter().map(|(old, tensor)| (name(old), tensor.clone())).collect();
    Model { config: model.config.clone(), tensors }
}

/// Opens `other` and checks that it is the model `of`: same embedding, head, routers and experts.
fn assert_same(of: &Model, other: &Model) {
    let (_dir, expected) = of.open();
    let (_other_dir, found) = other.open();
    let (expected, found) = (expected.unwrap(), found.unwrap());
    assert_eq!(found.shape(), expected.shape());
    let bytes =
        |checkpoint: &Checkpoint, role| checkpoint.bytes(&checkpoint.role(role).unwrap().name).unwrap().to_vec();
    for role in [Role::Embedding, Role::FinalNorm, Role::LmHead] {
        assert_eq!(bytes(&found, role), bytes(&expected, role), "{role:?}");
    }
    for layer in &expected.shape().layers {
        let router = Role::Layer(layer.layer, moe_checkpoint::LayerRole::Router);
        assert_eq!(bytes(&found, router), bytes(&expected, router));
        for expert in 0..layer.num_experts() {
            let weights = |checkpoint: &Checkpoint| format!("{:?}", checkpoint.expert(layer.layer, expert).unwrap());
            assert_eq!(weights(&found), weights(&expected));
        }
    }
    // Tensors keep the names they have.
    assert!(found.tensors().map(|info| &info.name).eq(other.tensors.keys()));
}

#[test]
fn a_decoder_is_found_by_any_published_prefix() {
    for family in ["tf4/qwen2_moe", "tf4/mixtral", "tf5/gpt_oss", "tf4/deepseek_v3"] {
        let model = Model::load(&fixture(family));
        for (prefix, head) in [
            ("model.language_model.", "lm_head."),
            ("language_model.model.", "language_model.lm_head."),
            ("thinker.model.", "thinker.lm_head."),
            ("", "lm_head."),
        ] {
            assert_same(
                &model,
                &renamed(&model, |name| match name.strip_prefix("model.") {
                    Some(rest) => format!("{prefix}{rest}"),
                    None => name.replace("lm_head.", head),
                }),
            );
        }
    }
    // A family whose release has a long prefix, with a short one.
    let model = Model::load(&fixture("../unrun/qwen3_5_moe"));
    assert_same(&model, &renamed(&model, |name| name.replace("model.language_model.", "model.")));
}

#[test]
fn a_tensor_without_a_place_is_refused_under_other_names_too() {
    let mut model =
        renamed(&Model::load(&fixture("tf4/qwen2_moe")), |name| name.replace("model.", "language_model.model."));
    let extra = model.tensors["lm_head.weight"].clone();
    model.tensors.insert("language_model.model.layers.1.mlp.extra.weight".into(), extra);
    assert_parts(&model.refusal(), &["`language_model.model.layers.1.mlp.extra.weight`", "no place for it in layer 1"]);
}

#[test]
fn a_wrapper_around_a_known_text_model_opens() {
    let model = Model::load(&fixture("tf4/deepseek_v3"));
    let mut wrapper = renamed(&model, |name| format!("language_model.{name}"));
    let mut text = model.config.clone();
    let tied = text.as_object_mut().unwrap().remove("tie_word_embeddings");
    wrapper.config = json!({"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 8}, "tie_word_embeddings": tied});
    let tower = Tensor { dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] };
    wrapper.tensors.insert("vision_tower.blocks.0.weight".into(), tower);
    assert_same(&model, &wrapper);
    let (_dir, opened) = wrapper.open();
    let opened = opened.unwrap();
    assert_eq!((opened.config().model_type.as_str(), opened.family().text_key()), ("deepseek_v3", Some("text_config")));
    // What is missing is said of the whole.
    wrapper.tensors.remove("language_model.model.norm.weight");
    assert_parts(&wrapper.refusal(), &["`language_model.model.norm.weight`", "`kimi_k25` around a `deepseek_v3`"]);
}

/// Qwen3-Omni as a whole: the thinker within its config and its names, and a talker whose experts are its own.
#[test]
fn a_whole_omni_model_is_its_thinker() {
    let thinker = Model::load(&fixture("tf5/qwen3_omni_moe_thinker"));
    let mut whole = renamed(&thinker, |name| format!("thinker.{name}"));
    let talker = json!({"model_type": "qwen3_omni_moe_talker_text", "num_experts": 4, "moe_intermediate_size": 8});
    whole.config = json!({
        "model_type": "qwen3_omni_moe", "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "thinker_config": thinker.config, "talker_config": {"text_config": talker}, "enable_audio_output": true
    });
    let tower = Tensor { dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] };
    whole.tensors.insert("talker.model.layers.0.mlp.experts.0.gate_proj.weight".into(), tower);
    assert_same(&thinker, &whole);
    let (_dir, opened) = whole.open();
    let opened = opened.unwrap();
    assert_eq!(opened.family().text_key(), Some("thinker_config.text_config"));
    let shape = UniformShape { width: 8, experts: Some(3), ..UniformShape::default() };
    let config = uniform_shape_config(opened.raw_config(), shape).unwrap();
    let text = &config["thinker_config"]["text_config"];
    assert_eq!((&text["num_experts"], &text["moe_intermediate_size"]), (&json!(3), &json!(8)));
    assert_eq!(config["talker_config"], whole.config["talker_config"]);
    // Errors name the place of a field in the whole.
    whole.config["thinker_config"]["text_config"]["hidden_size"] = json!("wide");
    assert_parts(&whole.refusal(), &["thinker_config.text_config.hidden_size", "wide"]);
}

#[test]
fn a_nested_config_with_experts_is_never_called_dense() {
    for config in [
        json!({"model_type": "future_llama", "text_config": {"model_type": "future_llama_text", "num_local_experts": 16}}),
        json!({"model_type": "some_omni", "thinker_config": {"text_config": {"model_type": "other_moe_text"}}}),
        json!({"model_type": "future_vl_moe", "text_config": {"model_type": "future_vl_moe_text"}}),
    ] {
        let name = config["model_type"].as_str().unwrap().to_string();
        let mut model = Model::load(&fixture("tf4/qwen2_moe"));
        model.config = config;
        let text = model.refusal();
        assert_parts(&text, &[&format!("`{name}` is not supported"), "known families"]);
    }
}

#[test]
fn names_of_transformers_5_open_for_families_released_under_others() {
    for (family, words) in [
        ("tf4/mixtral", &[(".block_sparse_moe.", ".mlp.")][..]),
        ("tf4/phimoe", &[(".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp.")]),
    ] {
        let model = Model::load(&fixture(family));
        let native = renamed(&model, |name| {
            let name = words.iter().fold(name.to_string(), |name, (own, other)| name.replace(own, other));
            [(".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")]
                .iter()
                .fold(name, |name, (own, other)| name.replace(own, other))
        });
        let mut native = native;
        native.fuse();
        assert_same(&model, &native);
    }
}

#[test]
fn granite_experts_open_one_by_one() {
    let model = Model::load(&fixture("tf5/granitemoe"));
    let mut unrolled = model.clone();
    let names: Vec<String> =
        model.tensors.keys().filter(|name| name.ends_with("input_linear.weight")).cloned().collect();
    for name in names {
        let prefix = name.trim_end_matches("input_linear.weight");
        let up = unrolled.tensors.remove(&name).unwrap();
        let down = unrolled.tensors.remove(&format!("{prefix}output_linear.weight")).unwrap();
        let [experts, rows, hidden] = up.shape[..] else { panic!("{:?}", up.shape) };
        let width = rows / 2;
        for expert in 0..experts {
            let mut put = |part: &str, shape: [usize; 2], bytes: &[u8]| {
                let tensor = Tensor { dtype: up.dtype, shape: shape.to_vec(), bytes: bytes.to_vec() };
                unrolled.tensors.insert(format!("{prefix}experts.{expert}.{part}.weight"), tensor);
            };
            let size = up.bytes.len() / experts / 2;
            let start = 2 * expert * size;
            put("gate_proj", [width, hidden], &up.bytes[start..start + size]);
            put("up_proj", [width, hidden], &up.bytes[start + size..start + 2 * size]);
            put("down_proj", [hidden, width], &down.bytes[expert * size..(expert + 1) * size]);
        }
    }
    assert_same(&model, &unrolled);
}

#[test]
fn layers_of_multi_token_prediction_need_no_declaration() {
    let mut model = Model::load(&fixture("tf4/deepseek_v3"));
    let layers = model.config["num_hidden_layers"].as_u64().unwrap();
    let norm = model.tensors["model.norm.weight"].clone();
    model.tensors.insert(format!("model.layers.{layers}.input_layernorm.weight"), norm.clone());
    // A layer too many is one thing, a layer that predicts further tokens another.
    assert_parts(&model.refusal(), &[&format!("`num_hidden_layers` in config.json is {layers}")]);
    model.tensors.insert(format!("model.layers.{layers}.enorm.weight"), norm);
    let (_dir, opened) = model.open();
    assert_eq!(opened.unwrap().mtp_tensors().count(), 2);
}

#[test]
fn what_a_config_says_of_quantization_counts_where_weights_are_quantized() {
    let mut model = Model::load(&fixture("tf4/qwen2_moe"));
    for leftover in [json!({}), json!({"quant_method": "bitsandbytes", "load_in_4bit": true})] {
        model.config["quantization_config"] = leftover;
        let (_dir, opened) = model.open();
        let opened = opened.unwrap();
        assert_eq!(opened.config().quantization, None);
    }
    let name = model.tensors.keys().find(|name| name.ends_with("q_proj.weight")).unwrap().clone();
    let tensor = model.tensor(&name);
    (tensor.dtype, tensor.bytes) = (Dtype::U8, vec![0; tensor.shape.iter().product()]);
    assert_parts(&model.refusal(), &["quantized weights", "bitsandbytes"]);
    // In the config of the text model, as in that of the whole.
    let mut nested = Model::load(&fixture("../unrun/qwen3_5_moe"));
    nested.config["text_config"]["quantization_config"] = json!({"quant_method": "bitsandbytes"});
    assert!(nested.open().1.is_ok());
    nested.config["text_config"]["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [8, 8]});
    // A matrix of E4M3 with its scales, beside which the config counts.
    let name = nested.tensors.keys().find(|name| name.ends_with("q_proj.weight")).unwrap().clone();
    let tensor = nested.tensor(&name);
    let scales =
        Tensor { dtype: Dtype::F32, shape: tensor.shape.iter().map(|s| s.div_ceil(8)).collect(), bytes: vec![] };
    let count: usize = scales.shape.iter().product();
    (tensor.dtype, tensor.bytes) = (Dtype::F8_E4M3, vec![0; tensor.shape.iter().product()]);
    nested.tensors.insert(format!("{name}_scale_inv"), Tensor { bytes: vec![0; 4 * count], ..scales });
    let (_dir, opened) = nested.open();
    assert!(opened.unwrap().config().quantization.is_some());
}

#[test]
fn fp8_factors_may_be_powers_of_two() {
    let mut model = Model::load(&fixture("tf5/deepseek_v3_fp8"));
    let mut powers = model.clone();
    for (name, tensor) in powers.tensors.iter_mut().filter(|(name, _)| name.ends_with("_scale_inv")) {
        assert_eq!(tensor.dtype, Dtype::F32, "{name}");
        let exponents: Vec<u8> = (0..tensor.bytes.len() / 4).map(|i| 120 + (i % 16) as u8).collect();
        let values: Vec<f32> = exponents.iter().map(|exponent| 2f32.powi(i32::from(*exponent) - 127)).collect();
        model.tensor(name).bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (tensor.dtype, tensor.bytes) = (Dtype::F8_E8M0, exponents);
    }
    assert_same(&model, &powers);
}

#[test]
fn an_index_goes_before_a_stray_file() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&fixture("tf5/qwen3_moe_sharded"), dir.path());
    fs::write(dir.path().join("model.safetensors"), "a leftover").unwrap();
    assert!(
        Checkpoint::open(dir.path()).unwrap().role(Role::Embedding).unwrap().file.to_string_lossy().contains("-of-")
    );
    // An index whose shards are gone is the leftover itself.
    let model = Model::load(&fixture("tf5/qwen3_moe_sharded"));
    fs::write(dir.path().join("model.safetensors"), model.weights()).unwrap();
    fs::remove_file(dir.path().join("model-00001-of-00006.safetensors")).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap().role(Role::Embedding).unwrap().file.ends_with("model.safetensors"));
}

#[test]
fn weights_of_another_kind_are_named_with_what_to_do() {
    let folder = |files: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(fixture("tf4/qwen2_moe").join("config.json"), dir.path().join("config.json")).unwrap();
        files.iter().for_each(|name| fs::write(dir.path().join(name), "{}").unwrap());
        message(Checkpoint::open(dir.path()))
    };
    for (files, parts) in [
        (&["pytorch_model.bin"][..], ["pytorch_model.bin", "pickled weights (.bin)"]),
        (&["consolidated.00.pth"], ["consolidated.00.pth", "the vendor's own format"]),
        (&["adapter_config.json", "adapter_model.safetensors"], ["adapter", "open its base model"]),
        (&["model-Q4_K_M.gguf"], ["model-Q4_K_M.gguf", "llama.cpp"]),
        (&["model-00001-of-00002.safetensors"], ["model-00001-of-00002.safetensors", "lack their index"]),
        (&["weights.npz"], ["weights.npz", "MLX"]),
        (&["other.safetensors"], ["no weights", "other.safetensors"]),
    ] {
        assert_parts(&folder(files), &parts);
    }
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n";
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&fixture("tf5/qwen3_moe_sharded"), dir.path());
    fs::write(dir.path().join("model-00002-of-00006.safetensors"), pointer).unwrap();
    assert_parts(
        &message(Checkpoint::open(dir.path())),
        &["model-00002-of-00006.safetensors", "Git LFS pointer", "git lfs pull"],
    );
    fs::write(dir.path().join("model.safetensors.index.json"), pointer).unwrap();
    assert_parts(&message(Checkpoint::open(dir.path())), &["model.safetensors.index.json", "Git LFS pointer"]);
}

#[test]
fn foreign_names_are_recognized() {
    let model = Model::load(&fixture("tf4/qwen2_moe"));
    let wrapped = renamed(&model, |name| format!("_orig_mod.{name}"));
    assert_parts(
        &wrapped.refusal(),
        &["`_orig_mod.model.embed_tokens.weight`", "without `_orig_mod.`", "torch.compile"],
    );
    let layer = |name: &str| name.contains(".mlp.experts.");
    let mut mlx = model.clone();
    mlx.tensors.retain(|name, _| !layer(name));
    let one = Tensor { dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] };
    mlx.tensors.insert("model.layers.0.mlp.switch_mlp.gate_proj.weight".into(), one.clone());
    assert_parts(&mlx.refusal(), &["MLX"]);
    let mut packed = model.clone();
    packed.tensors.retain(|name, _| !layer(name));
    packed.tensors.insert("model.layers.0.mlp.experts.0.gate_proj.qweight".into(), one.clone());
    assert_parts(&packed.refusal(), &["quantized weights (GPTQ, AWQ"]);
    let mut linear = Model::load(&fixture("tf5/gpt_oss"));
    linear
        .tensors
        .retain(|name, _| !name.contains(".mlp.experts.gate_up_proj") && !name.contains(".mlp.experts.down_proj"));
    linear.tensors.insert("model.layers.0.mlp.experts.gate_up_projs.0.weight".into(), one);
    assert_parts(&linear.refusal(), &["one linear map per expert"]);
}

#[test]
fn every_fixture_keeps_its_family() {
    for dir in common::fixtures() {
        let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(Path::new(&dir)).unwrap();
        let family = checkpoint.family();
        assert_eq!(Some(family.model_type()), family.text_config(&config)["model_type"].as_str());
    }
}

#[test]
fn linear_attention_that_does_not_fit_its_config_is_carried_along_and_says_so() {
    let mut model = Model::load(&fixture("tf5/qwen3_5_moe_full"));
    let (_dir, whole) = model.open();
    assert_eq!(whole.unwrap().cannot_run(), None);
    model.config["text_config"]["linear_num_value_heads"] = json!(64);
    let (_dir, carried) = model.open();
    let carried = carried.unwrap();
    let reason = carried.cannot_run().unwrap();
    assert!(reason.contains("linear_attn.") && reason.contains("linear_num_value_heads"), "{reason}");
    carried.expert(0, 0).unwrap();
    // What is no attention has to fit all the same.
    model.config["text_config"]["shared_expert_intermediate_size"] = json!(64);
    let refused = message(model.open().1);
    assert!(refused.contains("shared_expert"), "{refused}");
}
