//! What transformers 5 calls modules whose tensors have other names in files.

use moe_checkpoint::Checkpoint;

/// Texts in names of files, and what stands in their place in memory, in the order in which they are replaced. One that
/// begins with `^` is at the beginning of a name.
type Renames = &'static [(&'static str, &'static str)];

/// The path of a module, or the name of a tensor, in transformers 5, which renames the blocks of some families and the
/// prefix of some wrappers when it loads them: adapters are saved under these names.
pub(super) fn modern(path: &str, checkpoint: &Checkpoint) -> String {
    let mut path = path.to_string();
    for (file, memory) in of_family(&checkpoint.config().model_type) {
        path = match file.strip_prefix('^') {
            None => path.replace(file, memory),
            Some(file) => match path.strip_prefix(file) {
                Some(rest) => format!("{memory}{rest}"),
                None => path,
            },
        };
    }
    let wrapper = checkpoint.raw_config().get("model_type").and_then(|name| name.as_str()).unwrap_or_default();
    for (file, memory) in of_wrapper(wrapper) {
        if let Some(rest) = path.strip_prefix(file).filter(|_| !path.starts_with(memory)) {
            return format!("{memory}{rest}");
        }
    }
    path
}

fn of_family(model_type: &str) -> Renames {
    match model_type {
        "mixtral" | "minimax" | "minimax_m2" => &[(".block_sparse_moe.", ".mlp.")],
        "phimoe" => &[(".block_sparse_moe.gate", ".mlp.router"), (".block_sparse_moe.", ".mlp.")],
        "granitemoe" | "granitemoeshared" | "granitemoehybrid" => &[(".router.layer", ".router")],
        "kimi_linear" => &[
            (".block_sparse_moe.", ".mlp."),
            (".self_attn.f_a_proj", ".self_attn.forget_gate.f_a_proj"),
            (".self_attn.f_b_proj", ".self_attn.forget_gate.f_b_proj"),
        ],
        "bailing_hybrid" => &[
            ("model.word_embeddings", "model.embed_tokens"),
            (".attention.dense", ".self_attn.o_proj"),
            (".attention.f_proj", ".self_attn.forget_gate.f_proj"),
            (".attention.", ".self_attn."),
        ],
        "sarvam_moe" => &[
            ("model.word_embeddings", "model.embed_tokens"),
            (".attention.dense", ".self_attn.o_proj"),
            (".attention.query_layernorm", ".self_attn.q_norm"),
            (".attention.key_layernorm", ".self_attn.k_norm"),
            (".attention.", ".self_attn."),
        ],
        "deepseek_v4" => &[
            ("^layers.", "model.layers."),
            ("^embed", "model.embed_tokens"),
            ("^head", "lm_head"),
            ("^norm", "model.norm"),
            (".attn_norm", ".input_layernorm"),
            (".ffn_norm", ".post_attention_layernorm"),
            (".attn.q_norm", ".attn.q_a_norm"),
            (".attn.norm", ".attn.kv_norm"),
            (".attn.wq_a", ".attn.q_a_proj"),
            (".attn.wq_b", ".attn.q_b_proj"),
            (".attn.wo_b", ".attn.o_b_proj"),
            (".wkv", ".kv_proj"),
            (".wgate", ".gate_proj"),
            (".attn.", ".self_attn."),
            (".ffn.", ".mlp."),
            (".shared_experts.w1", ".shared_experts.gate_proj"),
            (".shared_experts.w2", ".shared_experts.down_proj"),
            (".shared_experts.w3", ".shared_experts.up_proj"),
        ],
        "hy_v3" => &[(".mlp.router.gate", ".mlp.gate"), (".mlp.shared_mlp.", ".mlp.shared_experts.")],
        "nemotron_h" => &[("backbone.", "model.")],
        "step3p5" => &[(".share_expert.", ".mlp.shared_experts."), (".moe.", ".mlp.")],
        _ => &[],
    }
}

/// Prefixes of the text model inside a wrapper.
fn of_wrapper(model_type: &str) -> Renames {
    match model_type {
        "kimi_k25" | "mistral3" => {
            &[("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")]
        }
        "step3p7" | "qwen3_omni_moe_thinker" => &[("model.", "model.language_model.")],
        "qwen3_omni_moe" => &[("thinker.model.", "thinker.model.language_model.")],
        _ => &[],
    }
}
