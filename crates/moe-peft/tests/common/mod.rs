//! Models, waves, logits, and gradients against difference quotients.

#![allow(dead_code, reason = "every test binary uses some of it")]

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::Device;
use moe_core::{
    Engine, EngineOptions, Model,
    data::{Sequence, Wave},
    host::HostView,
    trace::{Nobody, Observer, Signals},
};
use moe_peft::AdapterSet;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

pub fn device() -> Device {
    Device::flex()
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name)
}

pub fn model(name: &str) -> Model {
    Model::open(fixture(name), &device(), None).unwrap()
}

/// Numbers in ±0.3.
pub fn noise(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| (((i * 7919 + seed * 104_729 + 17) % 1009) as f32 / 504.5 - 1.0) * 0.3).collect()
}

pub fn wave(vocab: usize) -> Wave {
    let ids = |n: usize, seed: usize| (0..n).map(|i| ((i * 31 + seed * 13 + 5) % vocab) as u32).collect::<Vec<_>>();
    Wave { id: 0, sequences: vec![Sequence::new(ids(13, 1)), Sequence::new(ids(9, 2))] }
}

/// A file of numbers to compare with.
pub struct Expected(Vec<u8>);

impl Expected {
    pub fn load(path: &Path) -> Self {
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub fn doubles(&self, name: &str) -> Vec<f64> {
        self.bytes(name).as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
    }

    /// The rows of `input_ids`, one wave.
    pub fn wave(&self) -> Wave {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let length = file.tensor("input_ids").unwrap().shape()[1];
        let ids: Vec<u32> =
            self.bytes("input_ids").as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
        Wave { id: 0, sequences: ids.chunks(length).map(|row| Sequence::new(row.to_vec())).collect() }
    }
}

struct Logits(Vec<f32>);

impl Observer for Logits {
    fn needs(&self) -> Signals {
        Signals { logits: true, ..Signals::NONE }
    }

    fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> moe_core::Result<()> {
        self.0.extend(logits.as_slice());
        Ok(())
    }
}

pub fn logits(model: &Model, wave: &Wave) -> Vec<f32> {
    let mut logits = Logits(Vec::new());
    Engine::new(model, EngineOptions::default()).run(wave, &mut logits).unwrap();
    logits.0
}

pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

pub fn largest(a: &[f32]) -> f32 {
    a.iter().map(|a| a.abs()).fold(0.0, f32::max)
}

struct Trains;

impl Observer for Trains {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }
}

/// The sum of token losses, with gradients.
pub fn train_loss(model: &Model, wave: &Wave) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Trains).unwrap().loss.unwrap()
}

pub fn loss(model: &Model, wave: &Wave) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Nobody).unwrap().loss.unwrap()
}

pub fn check_gradients(model: &Model, set: &Arc<AdapterSet>, wave: &Wave) -> usize {
    check_gradients_of(model, set, wave, |_| true)
}

pub fn check_gradients_of(model: &Model, set: &Arc<AdapterSet>, wave: &Wave, names: impl Fn(&str) -> bool) -> usize {
    let adapted = model.with_adapters(set.clone()).unwrap();
    check_gradients_with(
        set,
        |with_gradients| match with_gradients {
            true => train_loss(&adapted, wave),
            false => loss(&adapted, wave),
        },
        names,
    )
}

/// Compares each trained matrix's gradient along a direction with difference quotients of the loss, and returns how
/// many.
pub fn check_gradients_with(set: &AdapterSet, loss: impl Fn(bool) -> f64, names: impl Fn(&str) -> bool) -> usize {
    let mut parameters = set.bank().parameters().unwrap();
    parameters.clear_gradients();
    set.bank().lend(&mut parameters, true).unwrap();
    loss(true);
    set.bank().take_back(&mut parameters, true).unwrap();
    let all: Vec<String> = parameters.iter().map(|(name, _)| name.to_string()).collect();
    let mut checked = 0;
    for (i, name) in all.iter().enumerate().filter(|(_, name)| names(name)) {
        let (start, gradient) = {
            let parameter = parameters.get(name).unwrap();
            (parameter.values.clone(), parameter.gradient().to_vec())
        };
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        if norm < 1e-3 {
            continue;
        }
        let direction: Vec<f32> =
            gradient.iter().zip(noise(start.len(), i)).map(|(g, n)| (f64::from(*g) / norm) as f32 + 0.1 * n).collect();
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let mut at = |h: f64| {
            let moved = start.iter().zip(&direction).map(|(v, d)| (f64::from(*v) + h * f64::from(*d)) as f32);
            parameters.get_mut(name).unwrap().values = moved.collect();
            set.bank().lend(&mut parameters, false).unwrap();
            let loss = loss(false);
            set.bank().take_back(&mut parameters, false).unwrap();
            loss
        };
        // steps that change the loss by so much, to both sides: a large one may change the choice of experts, and so
        // may even a small one to one side, and a small one is lost in rounding
        let here = at(0.0);
        let quotients = [2e-2, 4e-3, 1e-3].map(|change| {
            let h = change / slope;
            let (more, less) = (at(h), at(-h));
            [(more - less) / (2.0 * h), (more - here) / h, (here - less) / h]
        });
        at(0.0);
        let close = quotients.iter().flatten().any(|numeric| (numeric - slope).abs() < 0.03 * slope.abs());
        assert!(close, "{name}: gradient along a direction {slope}, difference quotients {quotients:?}");
        checked += 1;
    }
    set.bank().settle(parameters).unwrap();
    checked
}

pub fn write_safetensors(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = tensors
        .iter()
        .map(|(name, (shape, _))| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None::<HashMap<String, String>>).unwrap()).unwrap();
}

/// A checkpoint of experts one by one whose expert `e` is the expert `order[e]` of another.
pub fn permuted(from: &Path, to: &Path, order: &[usize]) {
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut out = BTreeMap::new();
    for (name, view) in file.tensors() {
        let floats: Vec<f32> = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mut name = name.clone();
        let mut values = floats.clone();
        if let Some((before, after)) = name.split_once(".experts.") {
            let (expert, part) = after.split_once('.').unwrap();
            let old: usize = expert.parse().unwrap();
            let new = order.iter().position(|o| *o == old).unwrap();
            name = format!("{before}.experts.{new}.{part}");
        } else if name.ends_with("mlp.gate.weight") {
            let width = view.shape()[1];
            values = order.iter().flat_map(|old| floats[old * width..(old + 1) * width].to_vec()).collect();
        }
        out.insert(name, (view.shape().to_vec(), values));
    }
    write_safetensors(&to.join("model.safetensors"), &out);
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
}
