//! Benchmarks: studies of quality, and what the benchmarks of speed share: random checkpoints and waves of a stated
//! shape.

pub mod adaptive_study;
#[cfg(feature = "candle")]
pub mod candle;
pub mod compare;
pub mod exports;
pub mod fine_grained;
pub mod flagship;
pub mod router_study;

pub(crate) use moe::{Error, Result, figures, format, progress, report, table};
pub(crate) use moe_cli::cli;

use std::path::Path;

use moe_checkpoint::{Dtype, ShardedWriter, TensorSpec, WriterOptions, encode, write_json};
use moe_core::data::{Sequence, Wave};

/// Directory of the bundled checkpoint that the studies run on; `data` in it has the rows.
pub const TINY_MOE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/assets/tiny-moe");

/// Shape of a random Qwen2-MoE checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Hidden size.
    pub hidden: usize,
    /// Decoder layers, all MoE.
    pub layers: usize,
    /// Experts per layer; 4 are active.
    pub experts: usize,
    /// Units per expert.
    pub width: usize,
    /// Width of the shared expert.
    pub shared: usize,
    /// Attention heads of width 64.
    pub heads: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

/// Four layers of 16 small experts: runs everywhere in seconds.
pub const SMALL: Size = Size { hidden: 256, layers: 4, experts: 16, width: 176, shared: 704, heads: 4, vocab: 8192 };
/// One layer of the shape of Qwen1.5-MoE-A2.7B, small vocabulary.
pub const WIDE_LAYER: Size =
    Size { hidden: 2048, layers: 1, experts: 60, width: 1408, shared: 5632, heads: 32, vocab: 1024 };

/// Writes a random bf16 checkpoint into the empty directory `dir`.
///
/// # Panics
/// If the directory cannot be written: there is nothing to measure then.
pub fn write_checkpoint(dir: &Path, size: Size) {
    let Size { hidden: h, layers, experts, width, shared, heads, vocab } = size;
    let config = serde_json::json!({
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_act": "silu", "hidden_size": h,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": h / heads,
        "intermediate_size": 4 * h, "moe_intermediate_size": width, "shared_expert_intermediate_size": shared,
        "num_experts": experts, "num_experts_per_tok": 4, "norm_topk_prob": false, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "qkv_bias": true, "torch_dtype": "bfloat16",
        "use_sliding_window": false, "sliding_window": null, "bos_token_id": 1, "eos_token_id": 2,
    });
    write_json(&dir.join("config.json"), &config).expect("config.json");
    let mut specs = Vec::new();
    let mut add =
        |name: String, shape: &[usize]| specs.push(TensorSpec { name, dtype: Dtype::BF16, shape: shape.to_vec() });
    add("model.embed_tokens.weight".into(), &[vocab, h]);
    for l in 0..layers {
        let p = format!("model.layers.{l}");
        add(format!("{p}.input_layernorm.weight"), &[h]);
        add(format!("{p}.post_attention_layernorm.weight"), &[h]);
        for part in ["q", "k", "v"] {
            add(format!("{p}.self_attn.{part}_proj.weight"), &[h, h]);
            add(format!("{p}.self_attn.{part}_proj.bias"), &[h]);
        }
        add(format!("{p}.self_attn.o_proj.weight"), &[h, h]);
        add(format!("{p}.mlp.gate.weight"), &[experts, h]);
        add(format!("{p}.mlp.shared_expert_gate.weight"), &[1, h]);
        let blocks =
            (0..experts).map(|e| (format!("experts.{e}"), width)).chain([("shared_expert".to_owned(), shared)]);
        for (block, width) in blocks {
            add(format!("{p}.mlp.{block}.gate_proj.weight"), &[width, h]);
            add(format!("{p}.mlp.{block}.up_proj.weight"), &[width, h]);
            add(format!("{p}.mlp.{block}.down_proj.weight"), &[h, width]);
        }
    }
    add("model.norm.weight".into(), &[h]);
    add("lm_head.weight".into(), &[vocab, h]);
    let options = WriterOptions::default();
    let mut writer = ShardedWriter::new(dir, options, specs.clone()).expect("writer");
    let mut random = 1u32;
    for spec in specs {
        let count: usize = spec.shape.iter().product();
        let norm = spec.name.contains("norm");
        let values: Vec<f32> = (0..count)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (random >> 8) as f32 / (1 << 23) as f32 - 1.0;
                if norm { 1.0 + 0.1 * x } else { 0.08 * x }
            })
            .collect();
        let mut bytes = Vec::with_capacity(2 * count);
        assert!(encode(Dtype::BF16, &values, &mut bytes));
        writer.write(&spec.name, &bytes).expect("tensor");
    }
    writer.finish().expect("checkpoint");
}

/// A wave of random tokens.
pub fn wave(sequences: usize, length: usize, vocab: usize) -> Wave {
    let mut random = 7u32;
    let mut sequence = || {
        let ids = (0..length)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                3 + (random >> 8) % (vocab as u32 - 3)
            })
            .collect();
        Sequence::new(ids)
    };
    Wave { id: 0, sequences: (0..sequences).map(|_| sequence()).collect() }
}
