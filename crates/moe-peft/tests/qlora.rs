//! Adapters on quantized bases: packed in memory, decoded where they are used.

mod common;
mod counting;
mod tuning;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use counting::{alone, peak};
use moe_checkpoint::{BasePrecision, Checkpoint, Existing};
use moe_core::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    trace::Nobody,
};
use moe_peft::{Recipe, Trained, TrainingRun, fold::FoldPrecision};

fn tiny_moe() -> Arc<Checkpoint> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Arc::new(Checkpoint::open(path).unwrap())
}

fn rows(vocabulary: u32) -> Vec<Wave> {
    let ids = |seed: u32| (0..12).map(|i| (i * 137 + seed * 31 + 3) % vocabulary).collect();
    (0..2).map(|id| Wave { id: u64::from(id), sequences: vec![Sequence::new(ids(id))] }).collect()
}

fn lora(dora: bool, steps: usize, rate: f64) -> Recipe {
    let targets = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    serde_json::from_value(serde_json::json!({
        "method": {"type": "lora", "r": 2, "lora_alpha": 4, "use_dora": dora, "target_modules": targets},
        "train": {"max_steps": steps, "epochs": steps, "schedule": {"peak": rate}},
    }))
    .unwrap()
}

fn train(model: &Model, waves: &[Wave], recipe: &Recipe, fold: FoldPrecision, directory: &Path) -> Trained {
    let labels = BTreeMap::new();
    let run = TrainingRun { model, waves, labels: &labels, directory, save_every: 100, resume: false, fold };
    run.train(recipe, &mut |_| Ok(())).unwrap()
}

/// Mean loss of a wave.
fn loss(model: &Model, wave: &Wave) -> f64 {
    let options = EngineOptions { loss: true, ..EngineOptions::default() };
    let report = Engine::new(model, options).run(wave, &mut Nobody).unwrap();
    report.loss.unwrap() / report.loss_tokens as f64
}

fn packed(base: &Arc<Checkpoint>) -> Model {
    let base = base.packed_in_memory().unwrap();
    Model::new(base, &common::device(), None).unwrap().with_weights_decoded_per_use()
}

fn fixtures() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/quantized");
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.join("config.json").is_file());
    all.sort();
    all
}

#[test]
fn the_first_loss_on_a_base_of_any_format_is_that_of_the_quantized_model() {
    let _alone = alone();
    let all = fixtures();
    assert!(all.len() > 25, "{}", all.len());
    for fixture in all {
        let name = fixture.file_name().unwrap().to_string_lossy().into_owned();
        let base = Arc::new(Checkpoint::open(&fixture).unwrap());
        // As it is read without any of this: decoded, and converted weights stay.
        let plain = Model::new(base.clone(), &common::device(), None).unwrap();
        let waves = rows(base.config().vocab_size as u32);
        let dir = tempfile::tempdir().unwrap();
        // LoRA on attention and experts; names of families differ.
        let mut recipe = lora(false, 1, 1e-3);
        if let moe_peft::MethodConfig::Lora(config) = &mut recipe.method {
            config.target_modules = Some(moe_peft::lora::Targets::Pattern(".*(self_attn|experts).*".into()));
        }
        let first = loss(&plain, &waves[0]);
        let trained = train(&packed(&base), &waves[..1], &recipe, FoldPrecision::Bf16, dir.path());
        let found = trained.cost.losses[0].loss;
        // Sums over tokens are the same; one of the two is divided as a batch of several waves would be.
        assert!((found - first).abs() <= 1e-14 * first.abs(), "{name}: {found} and {first}");
    }
}

#[test]
fn a_base_that_is_rounded_on_the_fly_takes_its_packed_bytes_and_little_besides() {
    let _alone = alone();
    let base = tiny_moe();
    let waves = rows(base.config().vocab_size as u32);
    let dir = tempfile::tempdir().unwrap();
    // All experts of all layers: what stays of a sweep over a model whose weights are converted once.
    let elements: u64 = base.shape().layers.iter().map(|l| l.widths.iter().sum::<usize>() as u64).sum::<u64>()
        * 3
        * base.config().hidden_size as u64;
    let plain = Model::new(base.clone(), &common::device(), None).unwrap();
    let recipe = lora(false, 2, 1e-3);
    let (full, _) = peak(|| train(&plain, &waves, &recipe, FoldPrecision::Bf16, &dir.path().join("plain")));
    assert!(full as u64 > 4 * elements, "{full} bytes of a base in f32");
    drop(plain);
    for name in ["nf4", "int4", "fp8", "mxfp4"] {
        for dora in [false, true] {
            let recipe = lora(dora, 2, 1e-3);
            let precision: BasePrecision = name.parse().unwrap();
            let (bytes, (quantized, converted)) = peak(|| {
                let quantized = precision.on(&base).unwrap();
                (quantized.model().clone(), 4 * quantized.report().elements)
            });
            let held = quantized.packed_bytes();
            // Held once: rounding works matrix by matrix.
            assert!((bytes as u64) < held + held / 4 + (2 << 20), "{name}: {bytes} to hold {held}");
            let model = Model::new(quantized, &common::device(), None).unwrap().with_weights_decoded_per_use();
            let dir = dir.path().join(format!("{name}-{dora}"));
            let (training, trained) = peak(|| train(&model, &waves, &recipe, FoldPrecision::Bf16, &dir));
            // Values, gradients and two moments of each; the same sweep over a base whose weights are converted once
            // holds all of them as f32, and this one none.
            let adapters = 4 * 4 * trained.cost.trained;
            assert!(training as u64 > adapters && held * 3 < converted, "{name}: {training}, {adapters}, {held}");
            assert!(
                training as u64 + converted < full as u64 + (1 << 20),
                "{name}: {training} with {converted}, {full}"
            );
        }
    }
}

#[test]
fn what_was_trained_is_folded_into_bf16_or_into_the_format_of_the_base() {
    let _alone = alone();
    let base = tiny_moe();
    let waves = rows(base.config().vocab_size as u32);
    for name in ["nf4", "int8", "mxfp4"] {
        let quantized = name.parse::<BasePrecision>().unwrap().on(&base).unwrap().model().clone();
        let model = packed(&quantized);
        let before = loss(&model, &waves[0]);
        for fold in [FoldPrecision::Bf16, FoldPrecision::AsBase] {
            let dir = tempfile::tempdir().unwrap();
            let trained = train(&model, &waves[..1], &lora(false, 12, 5e-3), fold, dir.path());
            let last = trained.cost.losses.last().unwrap().loss;
            assert!(last < before - 0.5, "{name}: {before} became {last}");
            let as_written = trained.as_written(&model, None).unwrap().unwrap();
            let measured = loss(&as_written, &waves[0]);
            assert!(measured < before - 0.4, "{name} {fold:?}: {before}, trained to {last}, written {measured}");
            let saved = trained.save(&model, dir.path(), Existing::Refuse).unwrap();
            let written = Arc::new(Checkpoint::open(saved.model.unwrap()).unwrap());
            assert_eq!(written.quantization().is_some(), fold == FoldPrecision::AsBase, "{name}");
            if fold == FoldPrecision::AsBase {
                assert_eq!(written.bytes_on_disk(), quantized.bytes_on_disk(), "{name}");
            }
            let again = Model::new(written, &common::device(), None).unwrap();
            assert_eq!(loss(&again, &waves[0]), measured, "{name}: what is measured is what is written");
        }
    }
}

#[test]
fn a_format_that_is_read_only_is_refused_as_the_format_of_the_result_before_training() {
    let _alone = alone();
    let gptq = fixtures().into_iter().find(|path| path.ends_with("gptq-v1-sym-qwen3_moe")).unwrap();
    let base = Arc::new(Checkpoint::open(gptq).unwrap());
    let (model, waves) = (packed(&base), rows(base.config().vocab_size as u32));
    let (labels, dir) = (BTreeMap::new(), tempfile::tempdir().unwrap());
    let run = TrainingRun {
        model: &model,
        waves: &waves,
        labels: &labels,
        directory: dir.path(),
        save_every: 1,
        resume: false,
        fold: FoldPrecision::AsBase,
    };
    let mut began = false;
    let tell = &mut |_: &moe_peft::RunEvent<'_>| {
        began = true;
        Ok(())
    };
    let error = run.train(&lora(false, 1, 1e-3), tell).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("GPTQ") && error.contains("read only") && error.contains("BF16"), "{error}");
    assert!(!began);
}
