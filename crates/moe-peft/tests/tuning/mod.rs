//! What tests of fine-tuning share.

#![allow(dead_code)]

use std::path::PathBuf;

use burn::tensor::Device;
use moe_core::{
    Engine, EngineOptions, Model, WaveReport,
    data::{Sequence, Wave},
    trace::{Nobody, Observer, Signals},
    train::{AdamW, Keep, Optimizer, Parameters, Schedule, TrainOptions},
};
use moe_peft::{AdapterSet, Bank, FineTune, Setting, TuningMethod, model_weights::OwnWeights};

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
    weights.install(&Setting::new(model), &mut set).unwrap();
    train(FineTune::new(model, set.into()).unwrap(), model, steps)
}

/// Trains what a task trains.
pub fn train(mut task: FineTune, model: &Model, steps: usize) -> (FineTune, Parameters) {
    let mut parameters = task.set().bank().parameters().unwrap();
    moe_core::train::train(&mut task, &mut parameters, &waves(model, 3), &options(steps), &mut |_| Ok(())).unwrap();
    (task, parameters)
}

/// Asks for gradients of what is trained.
pub struct Trains;

impl Observer for Trains {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }
}

/// A sweep that adds up gradients where they are trained.
pub fn sweep(model: &Model, wave: &Wave) -> WaveReport {
    let options = EngineOptions { loss: true, ..EngineOptions::default() };
    Engine::new(model, options).run(wave, &mut Trains).unwrap()
}

/// Replaces the values of a parameter, which no optimizer has, and forgets all gradients.
pub fn put(bank: &Bank, name: &str, values: Vec<f32>) {
    let mut parameters = bank.parameters().unwrap();
    parameters.get_mut(name).unwrap().values = values;
    bank.settle(parameters).unwrap();
}

/// Numbers in [-1, 1).
pub fn noise(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729 + 17) % 1009) as f32 / 504.5 - 1.0).collect()
}

/// Compares a parameter's gradient `found` with difference quotients of `loss` along a direction near it. Steps change
/// the loss by so much to both sides: a large one may change the choice of experts, and so may even a small one to one
/// side; a very small one is lost in rounding.
pub fn check_gradient(bank: &Bank, name: &str, found: &[f32], loss: impl Fn() -> f64) {
    let start = bank.get(name).unwrap().to_vec();
    let norm = found.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    assert!(norm > 1e-6, "{name}: gradient of length {norm}");
    let direction: Vec<f64> =
        found.iter().zip(noise(found.len(), 3)).map(|(g, n)| f64::from(*g) / norm + 0.03 * f64::from(n)).collect();
    let slope: f64 = found.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
    let at = |h: f64| {
        put(bank, name, start.iter().zip(&direction).map(|(v, d)| (f64::from(*v) + h * d) as f32).collect());
        loss()
    };
    let here = at(0.0);
    let quotients = [2e-2, 4e-3, 1e-3].map(|change| {
        let h = change / slope;
        let (more, less) = (at(h), at(-h));
        [(more - less) / (2.0 * h), (more - here) / h, (here - less) / h]
    });
    at(0.0);
    let close = quotients.iter().flatten().any(|numeric| (numeric - slope).abs() < 0.02 * slope.abs());
    assert!(close, "{name}: gradient along a direction {slope}, difference quotients {quotients:?}");
}
