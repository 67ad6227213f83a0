//! Config fields of multi-head latent attention.

use crate::Result;
use crate::config::{AttentionConfig, AttentionKind, LatentAttention, RopeConfig};
use crate::json::Fields;

use super::read::{self, MAX_SIZE};
use super::rope::deepseek_scale;

/// Reads the attention of DeepSeek-V2 and -V3.
pub(super) fn read(config: &Fields<'_>, rope: &RopeConfig) -> Result<AttentionConfig> {
    let num_heads = read::size(config, "num_attention_heads")?;
    let latent = LatentAttention {
        q_lora_rank: config.integer("q_lora_rank", 1, MAX_SIZE)?,
        kv_lora_rank: read::size(config, "kv_lora_rank")?,
        qk_nope_head_dim: read::size(config, "qk_nope_head_dim")?,
        qk_rope_head_dim: read::size(config, "qk_rope_head_dim")?,
        v_head_dim: read::size(config, "v_head_dim")?,
        norm_eps: 1e-6,
        kv_scale: 1.0,
    };
    if !latent.qk_rope_head_dim.is_multiple_of(2) {
        return Err(config.invalid("qk_rope_head_dim", "an even number, which the rotary embedding needs"));
    }
    let head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim;
    let attention_bias = config.bool("attention_bias")?.unwrap_or(false);
    Ok(AttentionConfig {
        rotary_dim: latent.qk_rope_head_dim,
        kind: AttentionKind::Latent(latent),
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        scale: deepseek_scale(rope, head_dim),
        // Whatever `num_key_value_heads` says: every head has keys and values of its own.
        ..read::grouped_attention(num_heads, num_heads, head_dim)
    })
}
