//! Weights in forms of their own: packed for matrix units, quantized.

use std::{path::Path, sync::Arc};

use burn::tensor::Device;
use moe_checkpoint::{Checkpoint, ExpertPart, QuantizeOptions, Quantized, QuantizedPart};
use moe_core::{
    Engine, EngineOptions, Error, Model, Precision,
    data::{Sequence, Wave},
    kernels::weight::Weight,
    overlay::KeepUnits,
};
use safetensors::SafeTensors;

use crate::{
    expected::{Expected, assert_close, assert_near},
    fixtures,
    observed::{Recorder, run},
};

/// Where the processor has matrix units, experts stored as bf16 go there as they are, biased or not; through an overlay
/// they are f32.
#[test]
fn packed_experts_compute_what_f32_experts_do() {
    for name in
        ["tf5/qwen2_moe_bf16", "tf5/gpt_oss_bf16", "tf5/gpt_oss_mxfp4", "tf5/deepseek_v3_bf16", "tf5/deepseek_v3_fp8"]
    {
        let packed = Model::open(fixtures().join(name), &Device::flex(), None).unwrap();
        let dense = packed.with_overlay(Arc::new(KeepUnits::new())).unwrap();
        let expert = packed.expert(1, 0).unwrap();
        let form = format!("{:?}{:?}", expert.gate_up, expert.down);
        assert_eq!(
            form.matches("Packed[").count(),
            if Weight::prefers_bf16(&Device::flex(), Precision::F32) { 2 } else { 0 },
            "{form}"
        );
        assert_eq!(expert.down_bias.is_some(), packed.config().moe(1).unwrap().biases.has(ExpertPart::DownBias));
        let ids = (0..23).map(|i| (i * 7 + 3) % packed.config().vocab_size as u32).collect();
        let wave = Wave { id: 0, sequences: vec![Sequence::new(ids)] };
        let [packed, dense] = [packed, dense].map(|model| {
            let mut recorder = Recorder::default();
            Engine::new(&model, EngineOptions::default()).run(&wave, &mut recorder).unwrap();
            recorder
        });
        assert_near(&format!("{name} logits"), &packed.logits, &dense.logits, 1e-5);
        assert_eq!(packed.gradients.len(), dense.gradients.len());
        for (key, gradients) in &packed.gradients {
            for ((part, a), (_, b)) in gradients.parts().into_iter().zip(dense.gradients[key].parts()) {
                assert_near(&format!("{name} {part} of {key:?}"), a, b, 1e-5);
            }
        }
    }
}

/// Quantized checkpoints compute what transformers computes for the weights that the packages of their formats decode,
/// each rounded once to BF16.
#[test]
fn quantized_checkpoints_compute_what_their_dequantized_weights_do() {
    let root = fixtures().join("../quantized");
    let mut names: Vec<_> = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.is_dir());
    names.sort();
    assert_eq!(names.len(), 37);
    let mut worst = 0.0f32;
    for dir in names {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
        let (ids, shape) = expected.integers("input_ids").unwrap();
        let sequences =
            ids.chunks(shape[1]).map(|row| Sequence::new(row.iter().map(|id| *id as u32).collect())).collect();
        let (found, _) = run(&dir, &Wave { id: 0, sequences }, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        worst = worst.max(assert_close(&name, &found.logits, &expected.floats("logits_bf16").unwrap()));
    }
    println!("largest difference of logits {worst:e}");
}

/// What is quantized here computes what stock transformers computes of it, written and dequantized to BF16 by its own
/// reader: `xtask/scripts/quantized.py` left the logits of the last two positions.
#[test]
fn quantized_models_compute_what_transformers_makes_of_their_files() {
    const CASES: [(&str, &str); 7] = [
        ("tiny-moe/fp8_blocks", r#"{"type": "fp8_blocks", "block": [32, 32]}"#),
        ("tiny-moe/fp8_channels", "fp8_channels"),
        ("tiny-moe/mxfp4", "mxfp4"),
        ("tiny-moe/int4", r#"{"type": "int", "bits": 4, "group_size": 32}"#),
        ("tiny-moe/int4_channels", r#"{"type": "int", "bits": 4, "group_size": null}"#),
        ("tiny-moe/int8", r#"{"type": "int", "bits": 8, "group_size": 32}"#),
        ("gpt_oss/mxfp4", "mxfp4"),
    ];
    let bytes = std::fs::read(fixtures().join("../quantized_exports.safetensors")).unwrap();
    let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
    assert_eq!(expected.0.names().len(), CASES.len() + 1);
    let (ids, _) = expected.integers("input_ids").unwrap();
    let wave = Wave { id: 0, sequences: vec![Sequence::new(ids.iter().map(|id| *id as u32).collect())] };
    for (name, format) in CASES {
        let (dir, part) = match name.starts_with("gpt_oss") {
            true => (fixtures().join("../quantized/mxfp4-gpt_oss"), QuantizedPart::Experts),
            false => {
                let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
                (dir, QuantizedPart::Linear)
            }
        };
        let base = Arc::new(Checkpoint::open(dir).unwrap());
        let options = QuantizeOptions { format: format.parse().unwrap(), part };
        let quantized = Quantized::on(&base, &options).unwrap();
        let model = Model::new(quantized.model().clone(), &Device::flex(), None).unwrap();
        let mut recorder = Recorder::default();
        Engine::new(&model, EngineOptions::default()).run(&wave, &mut recorder).unwrap();
        let logits = expected.floats(name).unwrap();
        assert_close(name, &recorder.logits[recorder.logits.len() - logits.len()..], &logits);
    }
}

/// Activations that are rounded once per product give every token nearly the logits of f32, but for those whose experts
/// change where two were close; the same bits whatever stays in memory; where the processor has no such products, those
/// of f32.
#[test]
fn rounded_activations_give_nearly_what_f32_gives() {
    const TOKENS: usize = 23;
    for name in ["tf5/qwen2_moe_bf16", "tf5/gpt_oss_bf16", "tf5/deepseek_v3_bf16", "tf5/deepseek_v3_fp8"] {
        let dir = fixtures().join(name);
        let exact = Model::open(&dir, &Device::flex(), None).unwrap();
        let available = Precision::Bf16.is_available(exact.device());
        let rounded = || Model::open(&dir, &Device::flex(), None).unwrap().with_precision(Precision::Bf16);
        let ids = (0..TOKENS).map(|i| (i as u32 * 7 + 3) % exact.config().vocab_size as u32).collect();
        let wave = Wave { id: 0, sequences: vec![Sequence::new(ids)] };
        let Error::Memory { needed, .. } = run(&dir, &wave, Some(1)).err().expect("one byte is too little") else {
            panic!("expected a memory error")
        };
        let starved = Model::open(&dir, &Device::flex(), Some(needed)).unwrap().with_precision(Precision::Bf16);
        let [exact, once, again, starved] = [exact, rounded(), rounded(), starved].map(|model| {
            let mut recorder = Recorder::default();
            Engine::new(&model, EngineOptions::default()).run(&wave, &mut recorder).unwrap();
            recorder
        });
        assert_eq!((&once.logits, &once.logits), (&again.logits, &starved.logits), "{name}");
        assert_eq!(once.logits != exact.logits, available, "{name}");
        let row = |values: &[f32], t: usize| {
            let width = values.len() / TOKENS;
            values[t * width..(t + 1) * width].to_vec()
        };
        let chosen = |weights: &[f32], t: usize| row(weights, t).iter().map(|w| *w != 0.0).collect::<Vec<_>>();
        let mut changed = 0;
        for t in 0..TOKENS {
            if once.routing.iter().zip(&exact.routing).any(|(a, b)| chosen(a, t) != chosen(b, t)) {
                changed += 1;
                continue;
            }
            let (found, expected) = (row(&once.logits, t), row(&exact.logits, t));
            let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let error = squares(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            let share = (error / squares(&mut expected.iter().copied())).sqrt();
            assert!(share < 0.02, "{name}, token {t}: {share}");
        }
        assert!(changed <= TOKENS / 10, "{name}: other experts for {changed} tokens");
        for (key, gradients) in &once.gradients {
            for ((part, a), (_, b)) in gradients.parts().into_iter().zip(starved.gradients[key].parts()) {
                assert_eq!(a, b, "{name} {part} of {key:?}");
            }
        }
    }
}
