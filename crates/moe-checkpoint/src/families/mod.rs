//! The families, one file each, and their registry.

mod afmoe;
mod cohere2_moe;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v4;
mod dense;
mod dots1;
mod ernie4_5_moe;
mod exaone_moe;
mod flex_olmo;
mod gemma4;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod hunyuan_v1_moe;
mod hy_v3;
mod jetmoe;
mod kimi_linear;
mod latent;
mod lfm2_moe;
mod llama4;
mod longcat_flash;
mod minimax;
mod minimax_m2;
mod mistral4;
mod mixtral;
pub(crate) mod names;
mod nemotron_h;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_5_moe;
mod qwen3_moe;
mod read;
mod rope;
mod sarvam_moe;
mod step3p5;

use crate::experts::ExpertLayout;
use crate::family::Family;
use read::Renormalize;

pub(crate) use dense::DENSE;
pub(crate) use read::MAX_SIZE;

/// Every family. Adding one is its file, and a line here.
pub(crate) static FAMILIES: &[&dyn Family] = &[
    &afmoe::Afmoe,
    &cohere2_moe::Cohere2Moe,
    &deepseek_v2::DeepseekV2,
    &deepseek_v3::DeepseekV3 { model_type: "deepseek_v3", dense: 0, indexer: None },
    &deepseek_v3::DeepseekV3 { model_type: "kimi_k2", dense: 0, indexer: None },
    &deepseek_v3::DeepseekV3 { model_type: "glm4_moe_lite", dense: 1, indexer: None },
    &deepseek_v3::DeepseekV3 { model_type: "deepseek_v32", dense: 3, indexer: Some(deepseek_v3::Indexer::DEEPSEEK) },
    &deepseek_v3::DeepseekV3 { model_type: "glm_moe_dsa", dense: 3, indexer: Some(deepseek_v3::Indexer::GLM) },
    &deepseek_v4::DeepseekV4 { dialect: deepseek_v4::Dialect::Released },
    &dots1::Dots1,
    &ernie4_5_moe::Ernie45Moe,
    &exaone_moe::ExaoneMoe,
    &glm4_moe::Glm4Moe { model_type: "glm4_moe", attention_bias: false },
    &glm4_moe::Glm4Moe { model_type: "glm4v_moe_text", attention_bias: true },
    &flex_olmo::FlexOlmo,
    &gemma4::Gemma4,
    &gpt_oss::GptOss,
    &granitemoe::GraniteMoe { model_type: "granitemoe", shared: false, hybrid: false },
    &granitemoe::GraniteMoe { model_type: "granitemoeshared", shared: true, hybrid: false },
    &granitemoe::GraniteMoe { model_type: "granitemoehybrid", shared: true, hybrid: true },
    &hunyuan_v1_moe::HunyuanV1Moe,
    &hy_v3::HyV3,
    &jetmoe::JetMoe,
    &kimi_linear::KimiLinear { model_type: "bailing_hybrid", bailing: true },
    &kimi_linear::KimiLinear { model_type: "kimi_linear", bailing: false },
    &lfm2_moe::Lfm2Moe,
    &llama4::Llama4,
    &longcat_flash::LongcatFlash,
    &minimax::MiniMax,
    &minimax_m2::MiniMaxM2,
    &mistral4::Mistral4,
    &mixtral::Mixtral,
    &nemotron_h::NemotronH,
    &olmoe::Olmoe,
    &phimoe::Phimoe,
    &qwen2_moe::Qwen2Moe,
    &qwen3_moe::Qwen3Moe {
        model_type: "qwen3_moe",
        renormalize: Renormalize::Default(false),
        stock_layout: ExpertLayout::PerExpert,
    },
    &qwen3_moe::Qwen3Moe {
        model_type: "qwen3_omni_moe_text",
        renormalize: Renormalize::Default(true),
        stock_layout: ExpertLayout::PerExpert,
    },
    &qwen3_moe::Qwen3Moe {
        model_type: "qwen3_vl_moe_text",
        renormalize: Renormalize::Always,
        stock_layout: ExpertLayout::Transposed,
    },
    &qwen3_5_moe::Qwen35Moe { model_type: "qwen3_5_moe_text", next: false },
    &qwen3_5_moe::Qwen35Moe { model_type: "qwen3_next", next: true },
    &sarvam_moe::SarvamMoe { model_type: "sarvam_moe", bailing: false },
    &sarvam_moe::SarvamMoe { model_type: "bailing_moe", bailing: true },
    &sarvam_moe::SarvamMoe { model_type: "bailing_moe_v2", bailing: true },
    &step3p5::Step3p5,
];
