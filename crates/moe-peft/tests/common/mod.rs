//! What tests of fine-tuning share.

#![allow(dead_code)]

use std::path::PathBuf;

use burn::tensor::Device;
use moe_core::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    trace::Nobody,
    train::{AdamW, Keep, Optimizer, Parameters, Schedule, TrainOptions},
};
use moe_peft::{AdapterSet, FineTune, own::OwnWeights};

/// A small checkpoint of a family.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name)
}

/// A model of a family.
pub fn model(name: &str) -> Model {
    Model::open(fixture(name), &Device::flex(), None).unwrap()
}

/// Waves of two sequences, different for each id.
pub fn waves(model: &Model, count: usize) -> Vec<Wave> {
    let vocab = model.config().vocab_size;
    let ids = |n: usize, seed: usize| (0..n).map(|i| ((i * 31 + seed * 13 + 5) % vocab) as u32).collect::<Vec<_>>();
    (0..count)
        .map(|w| Wave {
            id: w as u64,
            sequences: vec![Sequence::new(ids(13, 2 * w + 1)), Sequence::new(ids(9, 2 * w + 2))],
        })
        .collect()
}

/// Loss over a wave.
pub fn loss(model: &Model, wave: &Wave) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Nobody).unwrap().loss.unwrap()
}

/// A few steps of AdamW without clipping, each on one wave.
pub fn options(steps: usize) -> TrainOptions {
    TrainOptions {
        epochs: 100,
        max_steps: Some(steps),
        schedule: Schedule::constant(1e-2),
        optimizer: Optimizer::AdamW(AdamW::default()),
        clip: None,
        evaluate_every: None,
        keep: Keep::Last,
        ..TrainOptions::default()
    }
}

/// Trains weights of a model; the task and what came of it.
pub fn train_own(model: &Model, weights: &OwnWeights, steps: usize) -> (FineTune, Parameters) {
    let mut set = AdapterSet::new();
    weights.attach(model, &mut set).unwrap();
    train(FineTune::new(model, set.into()).unwrap(), model, steps)
}

/// Trains what a task trains.
pub fn train(mut task: FineTune, model: &Model, steps: usize) -> (FineTune, Parameters) {
    let mut parameters = task.set().bank().parameters().unwrap();
    moe_core::train::train(&mut task, &mut parameters, &waves(model, 3), &options(steps), &mut |_| Ok(())).unwrap();
    (task, parameters)
}
