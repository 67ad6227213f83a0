//! Training the experts of a model, and what of it comes to be in the weights.

#![allow(dead_code, reason = "every test binary uses some of it")]

use std::{path::Path, sync::Arc};

use moe_checkpoint::{Checkpoint, Dtype, ExpertPart, WriteOptions, write};
use moe_core::{
    Model,
    train::{Schedule, TrainOptions},
};
use moe_peft::{
    AdapterSet, FineTune,
    fold::Folded,
    lora::{Lora, LoraConfig, LoraWeights, Maps, Targets},
    merge::Merged,
    peft_files,
};

use crate::{
    common::{self, distance, largest, logits, noise, wave},
    forms::open,
    tuning,
};

pub fn run(checkpoint: &Arc<Checkpoint>) -> Model {
    Model::new(checkpoint.clone(), &common::device(), None).unwrap()
}

/// Both parameters of the experts, as peft names them.
pub fn experts() -> LoraConfig {
    LoraConfig {
        r: 2,
        lora_alpha: 4.0,
        target_modules: None,
        target_parameters: vec!["experts.gate_up_proj".into(), "experts.down_proj".into()],
        ..LoraConfig::default()
    }
}

/// Every matrix of every expert, with magnitudes.
pub fn dora() -> LoraConfig {
    let names = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"];
    let pattern = format!(r".*experts\.\d+\.({})", names.join("|"));
    LoraConfig {
        target_modules: Some(Targets::Pattern(pattern)),
        target_parameters: Vec::new(),
        use_dora: true,
        ..experts()
    }
}

pub fn install(model: &Model, weights: &LoraWeights) -> (Arc<AdapterSet>, Lora) {
    let mut set = AdapterSet::new();
    let maps = Maps::new(model.checkpoint());
    let lora = Lora::install(&mut set, &maps, &[("default", weights.clone())], model.device()).unwrap();
    (Arc::new(set), lora)
}

/// An adapter that changes what the model says.
pub fn trained(config: &LoraConfig, model: &Model) -> LoraWeights {
    let mut weights = config.init(&Maps::new(model.checkpoint()), None).unwrap();
    for (seed, low) in weights.maps.values_mut().enumerate() {
        low.b = noise(low.b.len(), seed);
        low.magnitude.iter_mut().flatten().for_each(|m| *m *= 1.1);
    }
    weights
}

/// Written and opened again, a model has the same bytes and computes the same bits.
pub fn written_alike(model: &Arc<Checkpoint>, dir: &Path, what: &str) -> Model {
    write(model, dir, &WriteOptions::default()).unwrap();
    let again = open(dir);
    for info in model.tensors() {
        assert!(again.bytes(&info.name).unwrap() == model.bytes(&info.name).unwrap(), "{what}: {}", info.name);
    }
    assert!(again.is_model(&model.fingerprint()), "{what}");
    let again = run(&again);
    let wave = wave(model.config().vocab_size);
    assert_eq!(logits(&again, &wave), logits(&run(model), &wave), "{what}");
    again
}

/// The experts of a checkpoint are those of a model with adapters, to the rounding of their dtype.
pub fn same_experts(weights: &Checkpoint, adapted: &Model, what: &str) {
    for layer in &weights.shape().layers {
        for expert in 0..layer.num_experts() {
            let found = weights.expert(layer.layer, expert).unwrap();
            let expected = adapted.expert(layer.layer, expert).unwrap();
            let matrix = |weight: &moe_core::kernels::weight::Weight| moe_core::host::into_vec(weight.to_tensor());
            let gate_up = [found.gate, found.up].concat();
            for (found, expected) in [(gate_up, matrix(&expected.gate_up)), (found.down, matrix(&expected.down))] {
                assert_eq!(found.len(), expected.len(), "{what}");
                let unit = if in_bf16(weights) { 1.0 / 256.0 } else { 1e-5 };
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() <= unit * expected.abs() + 1e-6, "{what}: {found} {expected}");
                }
            }
        }
    }
}

pub fn in_bf16(model: &Checkpoint) -> bool {
    let layer = model.shape().layers[0].layer;
    model.expert_dtype(layer, 0, ExpertPart::Gate).unwrap() == Some(Dtype::BF16)
}

/// Adapters of all experts that are zero, and such that were trained at a learning rate of 1e-12, folded: the model is
/// as it was.
pub fn learn_nothing(base: &Arc<Checkpoint>, dir: &Path, what: &str) {
    let model = run(base);
    let wave = wave(model.config().vocab_size);
    let before = logits(&model, &wave);

    let mut config = experts();
    let gateless =
        |layer: &moe_checkpoint::MoeLayerShape| base.config().moe(layer.layer).is_some_and(|moe| moe.gateless);
    if base.shape().layers.iter().all(gateless) {
        config.target_parameters.iter_mut().for_each(|name| *name = name.replace("gate_up_proj", "up_proj"));
    }
    let weights = config.init(&Maps::new(base), None).unwrap();
    let (set, _) = install(&model, &weights);
    Folded::check(base, &set).unwrap();
    let zero = Folded::on(base, &set).unwrap();
    assert!(zero.changes().unwrap().changed.is_empty(), "{what}: {:?}", zero.changes().unwrap());
    assert_eq!(logits(&run(zero.model()), &wave), before, "{what}");

    let options = TrainOptions { schedule: Schedule::constant(1e-12), ..tuning::options(1) };
    let mut task = FineTune::new(&model, set).unwrap();
    let mut parameters = task.set().bank().parameters().unwrap();
    let waves = tuning::waves(&model, 1);
    moe_core::train::train(&mut task, &mut parameters, &waves, &options, &mut |_| Ok(())).unwrap();
    task.set().bank().settle(parameters).unwrap();
    let folded = Folded::on(base, task.set()).unwrap();
    let moved = distance(&logits(&run(folded.model()), &wave), &before);
    assert!(moved < 1e-4, "{what}: {moved}");
    let written = written_alike(folded.model(), dir, what);
    assert!(distance(&logits(&written, &wave), &before) < 1e-4, "{what}");
}

/// Adapters that change much, folded and merged: the model is what it was with them.
pub fn learn_much(base: &Arc<Checkpoint>, config: &LoraConfig, dir: &Path, what: &str) {
    let model = run(base);
    let wave = wave(model.config().vocab_size);
    let weights = trained(config, &model);
    let (set, _) = install(&model, &weights);
    let beside = model.with_adapters(set.clone()).unwrap();
    let adapted = logits(&beside, &wave);
    let changed = distance(&adapted, &logits(&model, &wave));
    assert!(changed > 2e-3 * largest(&adapted), "{what}: {changed}");

    let folded = Folded::on(base, &set).unwrap();
    let merged = Merged::on(base, &[("default", &weights, 1.0)]).unwrap();
    for weights in [folded.model(), merged.model()] {
        same_experts(weights, &beside, what);
        // Rounded to BF16, a model may choose other experts.
        let found = logits(&run(weights), &wave);
        let tolerance = if in_bf16(base) { f32::INFINITY } else { 2e-5 * largest(&adapted).max(1.0) };
        assert!(distance(&found, &adapted) < tolerance, "{what}: {}", distance(&found, &adapted));
    }
    std::fs::create_dir_all(dir).unwrap();
    let at = |method: &str| dir.join(method);
    written_alike(folded.model(), &at("folded"), what);
    written_alike(merged.model(), &at("merged"), what);

    // The file of the adapter holds the same, and is known to before it is trained.
    let maps = Maps::new(base);
    let options = peft_files::WriteOptions::default().fitting(&weights, &maps);
    peft_files::check(&config.init(&maps, None).unwrap(), &maps, &options).unwrap();
    peft_files::write(at("adapter"), &weights, &maps, &options).unwrap();
    let read = peft_files::read(at("adapter"), &maps, peft_files::ReadOptions::default()).unwrap();
    let (set, _) = install(&model, &read);
    let again = logits(&model.with_adapters(set).unwrap(), &wave);
    assert!(distance(&again, &adapted) < 1e-5 * largest(&adapted).max(1.0), "{what}");
}
