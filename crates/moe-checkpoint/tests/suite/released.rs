//! Configs and tensors of released models that are too large to bring along: what their configs say, and names, shapes
//! and sizes from headers over weights that are not there.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use moe_checkpoint::{
    AttentionKind, Checkpoint, Dtype, ExpertBiases, ExpertLayout, LatentAttention, ModelConfig, Quantization, Routing,
    RoutingKind, SharedExpert,
};
use serde_json::{Map, Value, json};

/// moonshotai/Kimi-K2-Instruct.
fn kimi_k2() -> Value {
    let text = r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 131072, "model_type": "kimi_k2", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
        "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
        },
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"
        },
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 163840
    }"#;
    serde_json::from_str(text).unwrap()
}

/// moonshotai/Moonlight-16B-A3B.
fn moonlight() -> Value {
    let mut config = kimi_k2();
    let changes = json!({
        "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
        "quantization_config": null, "rms_norm_eps": 1e-5, "rope_scaling": null, "routed_scaling_factor": 2.446
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn latent(config: &ModelConfig) -> &LatentAttention {
    let AttentionKind::Latent(latent) = &config.attention.kind else { panic!("{:?}", config.attention) };
    latent
}

#[test]
fn kimi_k2_is_deepseek_v3_with_one_group() {
    let config = ModelConfig::from_json(&kimi_k2(), None).unwrap();
    assert_eq!((config.model_type.as_str(), config.layers.len(), config.mtp_layers), ("kimi_k2", 61, 0));
    let kind = RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None };
    assert_eq!(config.routing, Routing { scale: 2.827, ..Routing::new(8, kind) });
    assert!(config.moe(0).is_none());
    let moe = config.moe(60).unwrap();
    assert_eq!((&moe.widths, moe.biases), (&vec![2048; 384], ExpertBiases::None));
    assert_eq!(moe.shared, Some(SharedExpert::new(2048)));
    assert_eq!((latent(&config).q_lora_rank, latent(&config).kv_lora_rank), (Some(1536), 512));
    // (0.1 ln 32 + 1)^2 / sqrt(192)
    assert!((config.attention.softmax_scale() - 0.130_860_8).abs() < 1e-7, "{}", config.attention.softmax_scale());
    assert!(config.rope.interleaved);
    assert_eq!(config.quantization, Some(Quantization::Fp8Blocks { rows: 128, cols: 128 }));
    assert_eq!(config.eos_token_ids, [163_585]);
}

#[test]
fn moonlight_is_deepseek_v3_without_a_latent_of_queries() {
    let config = ModelConfig::from_json(&moonlight(), None).unwrap();
    assert_eq!((config.model_type.as_str(), config.layers.len()), ("deepseek_v3", 27));
    let kind = RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None };
    assert_eq!(config.routing, Routing { scale: 2.446, ..Routing::new(6, kind) });
    assert_eq!(config.moe(1).unwrap().widths, [1408; 64]);
    assert_eq!(config.moe(1).unwrap().shared, Some(SharedExpert::new(2816)));
    assert_eq!((latent(&config).q_lora_rank, config.attention.scale, config.rope.theta), (None, None, 50_000.0));
    assert_eq!((config.norm_eps, latent(&config).norm_eps), (1e-5, 1e-6));
}

/// The tensors of a model with latent attention, as released: names and shapes.
fn tensors(config: &Value) -> Vec<(String, Vec<usize>)> {
    let n = |key: &str| config[key].as_u64().map(|value| value as usize);
    let size = |key: &str| n(key).unwrap();
    let (h, heads) = (size("hidden_size"), size("num_attention_heads"));
    let (nope, rope, value, rank) =
        (size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("v_head_dim"), size("kv_lora_rank"));
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![size("vocab_size"), h]),
        ("model.norm.weight".to_string(), vec![h]),
        ("lm_head.weight".to_string(), vec![size("vocab_size"), h]),
    ];
    for layer in 0..size("num_hidden_layers") {
        let mut add =
            |name: String, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight".into(), &[h]);
        add("post_attention_layernorm.weight".into(), &[h]);
        match n("q_lora_rank") {
            None => add("self_attn.q_proj.weight".into(), &[heads * (nope + rope), h]),
            Some(rank) => {
                add("self_attn.q_a_proj.weight".into(), &[rank, h]);
                add("self_attn.q_a_layernorm.weight".into(), &[rank]);
                add("self_attn.q_b_proj.weight".into(), &[heads * (nope + rope), rank]);
            }
        }
        add("self_attn.kv_a_proj_with_mqa.weight".into(), &[rank + rope, h]);
        add("self_attn.kv_a_layernorm.weight".into(), &[rank]);
        add("self_attn.kv_b_proj.weight".into(), &[heads * (nope + value), rank]);
        add("self_attn.o_proj.weight".into(), &[h, heads * value]);
        let mut block = |name: String, width: usize| {
            add(format!("{name}.gate_proj.weight"), &[width, h]);
            add(format!("{name}.up_proj.weight"), &[width, h]);
            add(format!("{name}.down_proj.weight"), &[h, width]);
        };
        if layer < size("first_k_dense_replace") {
            block("mlp".into(), size("intermediate_size"));
            continue;
        }
        block("mlp.shared_experts".into(), size("n_shared_experts") * size("moe_intermediate_size"));
        (0..size("n_routed_experts")).for_each(|e| block(format!("mlp.experts.{e}"), size("moe_intermediate_size")));
        add("mlp.gate.weight".into(), &[size("n_routed_experts"), h]);
        add("mlp.gate.e_score_correction_bias".into(), &[size("n_routed_experts")]);
    }
    tensors
}

/// Writes a config and the header of its weights over a hole of their size.
fn hollow(dir: &Path, config: &Value) -> Checkpoint {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let fp8 = !config["quantization_config"].is_null();
    let (mut header, mut end) = (Map::new(), 0);
    let mut add = |name: String, dtype: &str, bytes: usize, shape: &[usize]| {
        let begin = end;
        end += bytes * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
    };
    for (name, shape) in tensors(config) {
        if fp8 && name.contains("_proj") {
            let blocks: Vec<usize> = shape.iter().map(|size| size.div_ceil(128)).collect();
            add(format!("{name}_scale_inv"), "F32", 4, &blocks);
            add(name, "F8_E4M3", 1, &shape);
        } else if name.ends_with("bias") {
            add(name, "F32", 4, &shape);
        } else {
            add(name, "BF16", 2, &shape);
        }
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// Parameters of the whole model: layers after the second are alike.
fn parameters(mut config: Value) -> u64 {
    let layers = config["num_hidden_layers"].as_u64().unwrap();
    let [two, three] = [2, 3].map(|layers| {
        config["num_hidden_layers"] = json!(layers);
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = hollow(dir.path(), &config);
        assert_eq!(checkpoint.expert_layout(1).unwrap(), ExpertLayout::PerExpert);
        let name = "model.layers.1.mlp.experts.3.up_proj.weight";
        assert_eq!(checkpoint.plain_dtype(name).unwrap(), Dtype::BF16);
        checkpoint.parameters()
    });
    two + (layers - 2) * (three - two)
}

#[test]
fn released_models_have_the_parameters_they_are_known_for() {
    // 1 T and 16 B, by their model cards.
    assert_eq!(parameters(kimi_k2()) / 1_000_000_000, 1026);
    assert_eq!(parameters(moonlight()) / 10_000_000, 1596);
}
