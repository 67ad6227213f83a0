//! What transformers computes for tiny checkpoints of each family, compared with what we compute: logits, layer inputs,
//! router logits, loss and expert gradients, to 1e-4 absolute; the same bits whether weights are resident or streamed;
//! and what generation with its cache continues with against the logits of a whole sweep.
#![cfg(feature = "flex")]

mod expected;
mod exports;
mod observed;
mod refusals;
mod weights;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use moe_core::{
    Error, Model,
    data::{Sequence, Wave},
    generate::{GenerateOptions, generate},
};
use safetensors::SafeTensors;

use expected::{Expected, assert_close, expected_gradients};
use observed::{Recorder, run};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity")
}

/// Rows of a `[rows, ..]` array.
fn pick(values: &[f32], rows: &[usize], count: usize) -> Vec<f32> {
    let width = values.len() / count;
    rows.iter().flat_map(|&r| values[r * width..(r + 1) * width].iter().copied()).collect()
}

/// The softmax of every row.
fn softmax_rows(values: &[f32], columns: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
        row.iter().map(|x| (x - max).exp() / sum).collect::<Vec<_>>()
    };
    values.chunks_exact(columns).flat_map(row).collect()
}

fn check(name: &str) {
    let dir = fixtures().join(name);
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
    let (ids, shape) = expected.integers("input_ids").unwrap();
    let mask = expected.integers("attention_mask").map_or_else(|| vec![1; ids.len()], |(mask, _)| mask);
    let count = ids.len();
    let valid: Vec<usize> = (0..count).filter(|&i| mask[i] == 1).collect();
    let sequences = (0..shape[0])
        .map(|s| {
            let row = s * shape[1]..(s + 1) * shape[1];
            Sequence::new(row.filter(|&i| mask[i] == 1).map(|i| ids[i] as u32).collect())
        })
        .collect();
    let wave = Wave { id: 0, sequences };

    let (found, loss) = run(&dir, &wave, None).unwrap();
    assert_close(&format!("{name} loss"), &[loss as f32], &expected.floats("loss").unwrap());
    let logits = pick(&expected.floats("logits").unwrap(), &valid, count);
    let logits = assert_close(&format!("{name} logits"), &found.logits, &logits);
    let mut hidden = 0.0f32;
    // One layer of LongCat-Flash is two of ours.
    let halves = if Model::open(&dir, &Device::flex(), None).unwrap().config().has_shortcuts() { 2 } else { 1 };
    for (layer, values) in found.hidden.iter().filter(|(layer, _)| **layer % halves == 0) {
        let layer = &(layer / halves);
        // files of long texts leave the embeddings out
        let Some(all) = expected.floats(&format!("hidden.{layer}")) else {
            assert!(*layer == 0 && name.ends_with("_long"), "{name}: no hidden.{layer}");
            continue;
        };
        hidden = hidden.max(assert_close(&format!("{name} hidden.{layer}"), values, &pick(&all, &valid, count)));
    }
    let mut router = None;
    assert!(!found.router_logits.is_empty());
    // what transformers 4 reports for gpt-oss are the routing weights
    let reported = if name == "tf4/gpt_oss" { &found.routing } else { &found.router_logits };
    for (n, values) in reported.iter().enumerate() {
        // transformers 4 does not report them for all families
        // those of attention stand between
        let n = if name.ends_with("jetmoe") { 2 * n + 1 } else { n };
        let Some(all) = expected.floats(&format!("router_logits.{n}")) else { continue };
        // what transformers reports for Gemma 4 are the probabilities
        let values = if name.contains("gemma4") { &softmax_rows(values, all.len() / count) } else { values };
        let worst = assert_close(&format!("{name} router_logits.{n}"), values, &pick(&all, &valid, count));
        router = Some(router.unwrap_or(0.0f32).max(worst));
    }
    assert!(router.is_some() || name.starts_with("tf4/"), "{name}: no router logits");
    check_choices(name, &found, &expected, &valid);
    let gradients = check_gradients(name, &dir, &found, &expected, wave.loss_tokens() as f32);
    let router = router.map_or("      -".into(), |r| format!("{r:.1e}"));
    println!("{name:<28} logits {logits:.1e} hidden {hidden:.1e} router {router} gradients {gradients:.1e}");
    check_generation(name, &dir, &wave);

    // Streamed: the least memory that works, so nothing is resident or kept and layer inputs go to a file.
    let Error::Memory { needed, .. } = run(&dir, &wave, Some(1)).err().expect("one byte is too little") else {
        panic!("expected a memory error")
    };
    let (streamed, streamed_loss) = run(&dir, &wave, Some(needed)).unwrap();
    assert_eq!(loss.to_bits(), streamed_loss.to_bits(), "{name}: streamed loss");
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found.logits), bits(&streamed.logits), "{name}: streamed logits");
    for (key, gradients) in &found.gradients {
        for ((part, a), (_, b)) in gradients.parts().into_iter().zip(streamed.gradients[key].parts()) {
            assert_eq!(bits(a), bits(b), "{name}: streamed {part} gradient of {key:?}");
        }
    }
}

/// Greedy continuations, whose keys and values are cached, are the most likely tokens of a sweep over the whole text.
fn check_generation(name: &str, dir: &Path, wave: &Wave) {
    let model = Model::open(dir, &Device::flex(), None).unwrap();
    let vocab = model.config().vocab_size;
    let prompts: Vec<Vec<u32>> =
        wave.sequences.iter().zip([11, 4]).map(|(s, n)| s.ids[..n.min(s.ids.len())].to_vec()).collect();
    let options = GenerateOptions { max_new_tokens: 9, ..Default::default() };
    let completions = generate(&model, &prompts, &options, |_| false).unwrap();
    for (prompt, completion) in prompts.iter().zip(completions) {
        assert_eq!(completion.len(), 9);
        let sequences = vec![Sequence::new([prompt.as_slice(), &completion].concat())];
        let (swept, _) = run(dir, &Wave { id: 0, sequences }, None).unwrap();
        for (i, &token) in completion.iter().enumerate() {
            let logits = &swept.logits[(prompt.len() - 1 + i) * vocab..][..vocab];
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(best - logits[token as usize] < 1e-4, "{name}: token {i} of the continuation");
        }
    }
}

/// The experts of every token and their weights, where a file has them.
fn check_choices(name: &str, found: &Recorder, expected: &Expected<'_>, valid: &[usize]) {
    for (n, routing) in found.routing.iter().enumerate() {
        let Some((index, shape)) = expected.integers(&format!("topk_index.{n}")) else { continue };
        let weights = expected.floats(&format!("topk_weight.{n}")).unwrap();
        let (top_k, experts) = (shape[1], routing.len() / valid.len());
        let mut dense = vec![0.0; routing.len()];
        let mut identities = vec![0.0; valid.len()];
        for (row, &token) in valid.iter().enumerate() {
            for slot in token * top_k..(token + 1) * top_k {
                match index[slot] as usize {
                    expert if expert < experts => dense[row * experts + expert] = weights[slot],
                    _ => identities[row] += weights[slot],
                }
            }
        }
        match found.identities.get(n) {
            Some(found) => {
                assert!(identities.iter().any(|weight| *weight > 0.0), "{name}: no identity expert is chosen");
                assert_close(&format!("{name} weights of identity experts {n}"), found, &identities);
            }
            None => assert!(identities.iter().all(|weight| *weight == 0.0), "{name}: more experts than ours"),
        }
        // transformers keeps the factor of Step-3.7 apart from them
        let factor = if name.contains("step3p7") { 3.0 } else { 1.0 };
        dense.iter_mut().for_each(|weight| *weight *= factor);
        assert_close(&format!("{name} routing weights {n}"), routing, &dense);
    }
}

/// Largest difference of all gradients.
fn check_gradients(name: &str, dir: &Path, found: &Recorder, expected: &Expected<'_>, loss_tokens: f32) -> f32 {
    let config = moe_checkpoint::Checkpoint::open(dir).unwrap().config().clone();
    let (mut checked, mut worst) = (0, 0.0f32);
    // some variants of a family leave them to the others
    if !expected.0.names().iter().any(|name| name.starts_with("grad.")) {
        return worst;
    }
    for (layer, _) in config.layers.iter().enumerate() {
        let Some(moe) = config.moe(layer) else { continue };
        for (e, &width) in moe.widths.iter().enumerate() {
            // newer files have those of some layers, the first one among them
            let hidden = config.expert_hidden_size();
            let of_file = if config.has_shortcuts() { layer / 2 } else { layer };
            let Some(gradients) = expected_gradients(expected, of_file, e, width, hidden) else {
                assert!(checked > 0, "{name}: no gradients of layer {layer}");
                continue;
            };
            assert_eq!(
                moe.biases == moe_checkpoint::ExpertBiases::All,
                !gradients.down_bias.is_empty(),
                "{name}: biases"
            );
            for (i, (part, expected)) in gradients.parts().into_iter().enumerate() {
                if expected.is_empty() {
                    continue;
                }
                let mean = match found.gradients.get(&(layer, e)) {
                    Some(found) if moe.gateless && i == 0 => {
                        let (gate, up) = found.gate_up.split_at(found.gate_up.len() / 2);
                        gate.iter().zip(up).map(|(gate, up)| (gate + up) / loss_tokens).collect()
                    }
                    Some(found) => found.parts()[i].1.iter().map(|v| v / loss_tokens).collect(),
                    None => vec![0.0; expected.len()],
                };
                let what = format!("{name} layer {layer} expert {e} {part} gradient");
                worst = worst.max(assert_close(&what, &mean, expected));
                checked += 1;
            }
        }
    }
    assert!(checked > 0);
    worst
}

macro_rules! parity {
    ($($test:ident: $fixture:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            check($fixture);
        })*

        /// A fixture nobody compares with would be a hole.
        #[test]
        fn every_fixture_is_checked() {
            let checked = [$($fixture),*];
            for generation in ["tf4", "tf5"] {
                for entry in std::fs::read_dir(fixtures().join(generation)).unwrap() {
                    let name = format!("{generation}/{}", entry.unwrap().file_name().to_string_lossy());
                    assert!(checked.contains(&name.as_str()), "{name} is not in the list");
                }
            }
        }
    };
}

parity! {
    tf4_deepseek_v2: "tf4/deepseek_v2",
    tf4_deepseek_v3: "tf4/deepseek_v3",
    tf4_glm4_moe: "tf4/glm4_moe",
    tf4_gpt_oss: "tf4/gpt_oss",
    tf4_mixtral: "tf4/mixtral",
    tf4_olmoe: "tf4/olmoe",
    tf4_phimoe: "tf4/phimoe",
    tf4_qwen2_moe: "tf4/qwen2_moe",
    tf4_qwen2_moe_padded: "tf4/qwen2_moe_padded",
    tf4_qwen2_moe_sliding: "tf4/qwen2_moe_sliding",
    tf4_qwen3_moe: "tf4/qwen3_moe",
    tf5_afmoe: "tf5/afmoe",
    tf5_bailing_hybrid: "tf5/bailing_hybrid",
    tf5_bailing_hybrid_long: "tf5/bailing_hybrid_long",
    tf5_bailing_moe: "tf5/bailing_moe",
    tf5_bailing_moe_v2: "tf5/bailing_moe_v2",
    tf5_cohere2_moe: "tf5/cohere2_moe",
    tf5_deepseek_v2: "tf5/deepseek_v2",
    tf5_deepseek_v2_group: "tf5/deepseek_v2_group",
    tf5_deepseek_v2_yarn: "tf5/deepseek_v2_yarn",
    tf5_deepseek_v3: "tf5/deepseek_v3",
    tf5_deepseek_v4: "tf5/deepseek_v4",
    tf5_deepseek_v4_saved: "tf5/deepseek_v4_saved",
    tf5_deepseek_v3_bf16: "tf5/deepseek_v3_bf16",
    tf5_deepseek_v3_fp8: "tf5/deepseek_v3_fp8",
    tf5_deepseek_v32: "tf5/deepseek_v32",
    tf5_deepseek_v32_long: "tf5/deepseek_v32_long",
    tf5_deepseek_v32_topk: "tf5/deepseek_v32_topk",
    tf5_deepseek_v3_yarn: "tf5/deepseek_v3_yarn",
    tf5_dots1: "tf5/dots1",
    tf5_ernie4_5_moe: "tf5/ernie4_5_moe",
    tf5_exaone_moe: "tf5/exaone_moe",
    tf5_flex_olmo: "tf5/flex_olmo",
    tf5_gemma4_full: "tf5/gemma4_full",
    tf5_gemma4_text: "tf5/gemma4_text",
    tf5_gemma4_text_long: "tf5/gemma4_text_long",
    tf5_gemma4_text_ple: "tf5/gemma4_text_ple",
    tf5_glm4_moe: "tf5/glm4_moe",
    tf5_glm4_moe_lite: "tf5/glm4_moe_lite",
    tf5_glm4_moe_lite_group: "tf5/glm4_moe_lite_group",
    tf5_glm4v_moe_full: "tf5/glm4v_moe_full",
    tf5_glm_moe_dsa: "tf5/glm_moe_dsa",
    tf5_glm_moe_dsa_long: "tf5/glm_moe_dsa_long",
    tf5_glm_moe_dsa_topk: "tf5/glm_moe_dsa_topk",
    tf5_gpt_oss: "tf5/gpt_oss",
    tf5_gpt_oss_bf16: "tf5/gpt_oss_bf16",
    tf5_gpt_oss_mxfp4: "tf5/gpt_oss_mxfp4",
    tf5_granitemoe: "tf5/granitemoe",
    tf5_granitemoehybrid: "tf5/granitemoehybrid",
    tf5_granitemoehybrid_long: "tf5/granitemoehybrid_long",
    tf5_granitemoehybrid_rope: "tf5/granitemoehybrid_rope",
    tf5_granitemoeshared: "tf5/granitemoeshared",
    tf5_hunyuan_v1_moe: "tf5/hunyuan_v1_moe",
    tf5_hy_v3: "tf5/hy_v3",
    tf5_jetmoe: "tf5/jetmoe",
    tf5_kimi_k2: "tf5/kimi_k2",
    tf5_kimi_k25_full: "tf5/kimi_k25_full",
    tf5_kimi_linear: "tf5/kimi_linear",
    tf5_kimi_linear_long: "tf5/kimi_linear_long",
    tf5_lfm2_moe: "tf5/lfm2_moe",
    tf5_llama4_full: "tf5/llama4_full",
    tf5_llama4_text: "tf5/llama4_text",
    tf5_llama4_text_long: "tf5/llama4_text_long",
    tf5_llama4_text_topk2: "tf5/llama4_text_topk2",
    tf5_longcat_flash: "tf5/longcat_flash",
    tf5_minimax: "tf5/minimax",
    tf5_minimax_m2: "tf5/minimax_m2",
    tf5_mistral4: "tf5/mistral4",
    tf5_mistral4_full: "tf5/mistral4_full",
    tf5_mixtral: "tf5/mixtral",
    tf5_mixtral_gelu_tanh: "tf5/mixtral_gelu_tanh",
    tf5_mixtral_native: "tf5/mixtral_native",
    tf5_mixtral_released: "tf5/mixtral_released",
    tf5_moonlight: "tf5/moonlight",
    tf5_nemotron_h: "tf5/nemotron_h",
    tf5_nemotron_h_latent: "tf5/nemotron_h_latent",
    tf5_nemotron_h_long: "tf5/nemotron_h_long",
    tf5_olmoe: "tf5/olmoe",
    tf5_phimoe: "tf5/phimoe",
    tf5_phimoe_longrope: "tf5/phimoe_longrope",
    tf5_phimoe_native: "tf5/phimoe_native",
    tf5_phimoe_released: "tf5/phimoe_released",
    tf5_qwen2_moe: "tf5/qwen2_moe",
    tf5_qwen2_moe_bf16: "tf5/qwen2_moe_bf16",
    tf5_qwen2_moe_linear: "tf5/qwen2_moe_linear",
    tf5_qwen2_moe_mixed: "tf5/qwen2_moe_mixed",
    tf5_qwen2_moe_padded: "tf5/qwen2_moe_padded",
    tf5_qwen2_moe_sliding: "tf5/qwen2_moe_sliding",
    tf5_qwen3_5_moe_full: "tf5/qwen3_5_moe_full",
    tf5_qwen3_5_moe_full_saved: "tf5/qwen3_5_moe_full_saved",
    tf5_qwen3_5_moe_text: "tf5/qwen3_5_moe_text",
    tf5_qwen3_5_moe_text_long: "tf5/qwen3_5_moe_text_long",
    tf5_qwen3_5_moe_text_native: "tf5/qwen3_5_moe_text_native",
    tf5_qwen3_5_moe_text_padded: "tf5/qwen3_5_moe_text_padded",
    tf5_qwen3_moe: "tf5/qwen3_moe",
    tf5_qwen3_moe_gelu: "tf5/qwen3_moe_gelu",
    tf5_qwen3_moe_long: "tf5/qwen3_moe_long",
    tf5_qwen3_moe_sharded: "tf5/qwen3_moe_sharded",
    tf5_qwen3_moe_yarn: "tf5/qwen3_moe_yarn",
    tf5_qwen3_next: "tf5/qwen3_next",
    tf5_qwen3_next_long: "tf5/qwen3_next_long",
    tf5_qwen3_next_mixed: "tf5/qwen3_next_mixed",
    tf5_qwen3_omni_moe_thinker: "tf5/qwen3_omni_moe_thinker",
    tf5_qwen3_vl_moe_full: "tf5/qwen3_vl_moe_full",
    tf5_qwen3_vl_moe_full_saved: "tf5/qwen3_vl_moe_full_saved",
    tf5_qwen3_vl_moe_mixed: "tf5/qwen3_vl_moe_mixed",
    tf5_sarvam_moe: "tf5/sarvam_moe",
    tf5_step3p7_full: "tf5/step3p7_full",
}
