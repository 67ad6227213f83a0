//! Layers that are dropped: which ones, and what stock loaders read of what is left.
#![cfg(feature = "flex")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::Device;
use moe_checkpoint::{Checkpoint, LayerDrop, WriteOptions, write};
use moe_core::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    depth::{Influence, LayerChoice, LayerPath},
    trace::Nobody,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5")
}

fn wave(vocab: usize) -> Wave {
    let sequence = |seed: usize, n: usize| {
        Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % vocab.min(90)) as u32).collect())
    };
    Wave { id: 0, sequences: vec![sequence(1, 13), sequence(2, 9)] }
}

fn loss(model: &Model) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&wave(model.config().vocab_size), &mut Nobody).unwrap().loss.unwrap()
}

#[test]
fn a_model_without_layers_is_the_model_under_a_path_without_them_bit_for_bit() {
    let mut dropped = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let Ok(model) = Model::open(&dir, &Device::flex(), None) else { continue };
        let count = model.config().layers.len();
        for layer in 0..count {
            let base = model.checkpoint();
            let left = match LayerDrop::new([layer]).on(base) {
                Ok(left) => left,
                Err(error) => {
                    assert!(error.to_string().contains("dropping layers"), "{name} {layer}: {error}");
                    continue;
                }
            };
            assert_eq!(left.config().layers.len(), count - 1, "{name}");
            let without = Model::new(left, &Device::flex(), None).unwrap();
            let under = model.with_path(LayerPath::without(count, layer..layer + 1)).unwrap();
            assert_eq!(loss(&without).to_bits(), loss(&under).to_bits(), "{name} without layer {layer}");
            dropped += 1;
        }
    }
    assert!(dropped > 40, "{dropped}");
}

#[test]
fn what_is_written_is_read_again_and_dropping_nothing_changes_nothing() {
    let out = tempfile::tempdir().unwrap();
    for name in ["qwen2_moe", "deepseek_v3", "gpt_oss"] {
        let base = Arc::new(Checkpoint::open(fixtures().join(name)).unwrap());
        let all = LayerDrop::new([]).on(&base).unwrap();
        assert_eq!(all.config(), base.config());
        let model = Model::new(base.clone(), &Device::flex(), None).unwrap();
        assert_eq!(loss(&Model::new(all, &Device::flex(), None).unwrap()).to_bits(), loss(&model).to_bits());
        let last = base.config().layers.len() - 1;
        let left = LayerDrop::new([last]).on(&base).unwrap();
        let to = out.path().join(name);
        write(&left, &to, &WriteOptions::default()).unwrap();
        let read = Model::open(&to, &Device::flex(), None).unwrap();
        let expected = Model::new(left, &Device::flex(), None).unwrap();
        assert_eq!(loss(&read).to_bits(), loss(&expected).to_bits(), "{name}");
    }
}

#[test]
fn a_rhythm_that_does_not_survive_becomes_a_list_or_is_refused() {
    let base = Arc::new(Checkpoint::open(fixtures().join("qwen2_moe_mixed")).unwrap());
    let count = base.config().layers.len();
    for layer in 0..count {
        match LayerDrop::new([layer]).on(&base) {
            Ok(left) => {
                let kept: Vec<_> = (0..count).filter(|l| *l != layer).map(|l| base.config().moe(l).is_some()).collect();
                let found: Vec<_> = (0..count - 1).map(|l| left.config().moe(l).is_some()).collect();
                assert_eq!(found, kept, "{layer}");
            }
            Err(error) => assert!(error.to_string().contains("dropping layers"), "{error}"),
        }
    }
    let message = |layers: &[usize]| LayerDrop::new(layers.to_vec()).on(&base).err().unwrap().to_string();
    assert!(message(&[99]).contains("layer 99 of a model with"), "{}", message(&[99]));
    assert!(message(&(0..count).collect::<Vec<_>>()).contains("no layer with routed experts"));
}

#[test]
fn influence_is_measured_before_the_final_norm_and_chooses_what_changes_least() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let model = Model::open(dir, &Device::flex(), None).unwrap();
    let count = model.config().layers.len();
    let mut seen = Influence::new(count);
    let engine = Engine::new(&model, EngineOptions::default());
    for id in 0..2 {
        engine.run(&Wave { id, ..wave(90) }, &mut seen).unwrap();
    }
    let layers = seen.layers().unwrap();
    assert_eq!(layers.len(), count);
    for found in &layers {
        assert!((0.0..=2.0).contains(&found.block) && found.norm_ratio > 0.0, "{found:?}");
        assert_eq!(found.spans.len(), count - found.layer);
        assert!(found.spans.iter().all(|d| (0.0..=1.0).contains(d)) && found.feed_forward.is_some());
    }
    let least = LayerChoice::Influence { layers: 1 }.layers(count, Some(&layers)).unwrap();
    assert!(layers.iter().all(|found| found.block >= layers[least[0]].block));
    assert!(Influence::new(4).layers().unwrap_err().to_string().contains("tokens to measure layers on"));
}

#[test]
fn layer_norms_of_a_centered_stream_are_rms_norms() {
    for name in ["phimoe", "phimoe_longrope"] {
        let model = Model::open(fixtures().join(name), &Device::flex(), None).unwrap();
        let expected = loss(&model);
        // read as LayerNorms, as stock loaders would, and run as RMSNorms
        let centered = moe_checkpoint::StreamEdit::Center.on(model.checkpoint()).unwrap();
        let as_layer_norms = loss(&Model::new(centered, &Device::flex(), None).unwrap());
        let as_rms_norms = loss(&model.with_folded_norms().unwrap());
        for found in [as_layer_norms, as_rms_norms] {
            assert!((found - expected).abs() < 1e-5 * expected, "{name}: {found} {expected}");
        }
        assert_ne!(as_rms_norms.to_bits(), expected.to_bits(), "{name}: nothing was folded");
    }
    let rms = Model::open(fixtures().join("qwen2_moe"), &Device::flex(), None).unwrap();
    let error = rms.with_folded_norms().unwrap_err().to_string();
    assert!(error.contains("has RMSNorms already"), "{error}");
}

#[test]
fn scaled_norms_are_the_explicit_factor_and_keep_it_when_layers_go() {
    let base = Arc::new(Checkpoint::open(fixtures().join("qwen2_moe")).unwrap());
    let scaled = moe_checkpoint::StreamEdit::ScaleNorms.on(&base).unwrap();
    use moe_checkpoint::{LayerRole, Role};
    for layer in 0..base.config().layers.len() {
        for role in [LayerRole::AttentionNorm, LayerRole::FfnNorm] {
            let (plain, found) =
                (base.read_f32(Role::Layer(layer, role)).unwrap(), scaled.read_f32(Role::Layer(layer, role)).unwrap());
            let factor = 1.0 / ((layer + 1) as f32).sqrt();
            assert!(plain.iter().zip(&found).all(|(a, b)| (a * factor - b).abs() < 1e-6));
        }
    }
    let dropped = LayerDrop::new([0]).on(&scaled).unwrap();
    let own = scaled.read_f32(Role::Layer(1, LayerRole::FfnNorm)).unwrap();
    assert_eq!(dropped.read_f32(Role::Layer(0, LayerRole::FfnNorm)).unwrap(), own);
}
