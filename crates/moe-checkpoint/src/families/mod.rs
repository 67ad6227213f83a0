//! The families, one file each, and their registry.

mod deepseek_v2;
mod deepseek_v3;
mod ernie4_5_moe;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod latent;
mod mixtral;
mod names;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_5_moe;
mod qwen3_moe;
mod read;
mod rope;

use crate::family::Family;

pub(crate) use read::MAX_SIZE;

/// Every family. Adding one is its file, and a line here.
pub(crate) static FAMILIES: &[&dyn Family] = &[
    &deepseek_v2::DeepseekV2,
    &deepseek_v3::DeepseekV3 { model_type: "deepseek_v3" },
    &deepseek_v3::DeepseekV3 { model_type: "kimi_k2" },
    &ernie4_5_moe::Ernie45Moe,
    &glm4_moe::Glm4Moe,
    &gpt_oss::GptOss,
    &granitemoe::GraniteMoe,
    &mixtral::Mixtral,
    &olmoe::Olmoe,
    &phimoe::Phimoe,
    &qwen2_moe::Qwen2Moe,
    &qwen3_moe::Qwen3Moe,
    &qwen3_5_moe::Qwen35Moe {
        model_type: "qwen3_5_moe",
        prefix: "model.language_model",
        text_key: Some("text_config"),
    },
    &qwen3_5_moe::Qwen35Moe { model_type: "qwen3_5_moe_text", prefix: "model", text_key: None },
];
