//! Scores of the bundled tiny-moe checkpoint through the engine, against PyTorch's autograd, and the bits of
//! interrupted and shared collections.
#![cfg(feature = "flex")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use moe_checkpoint::{Provenance, StatisticsStore};
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_core::trace::Observer;
use moe_core::{Engine, EngineOptions, Model, WaveReport};
use moe_importance::scorers::{Activation, Criterion, Fisher, RouterScore};
use moe_importance::{Collection, NoWeights, Scorer, WaveRunner, collect};
use safetensors::SafeTensors;

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn model() -> Model {
    Model::open(path("../../examples/assets/tiny-moe"), &Device::flex(), None).unwrap()
}

fn reference() -> Vec<u8> {
    std::fs::read(path("tests/fixtures/tiny_moe_gradients.safetensors")).unwrap()
}

fn integers(tensors: &SafeTensors<'_>, name: &str) -> Vec<u64> {
    let data = tensors.tensor(name).unwrap();
    data.data().as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

fn sequences(tensors: &SafeTensors<'_>) -> Vec<Sequence> {
    let mut ids = integers(tensors, "ids").into_iter().map(|id| u32::try_from(id).unwrap());
    let lengths = integers(tensors, "lengths");
    lengths.into_iter().map(|length| Sequence::new(ids.by_ref().take(length as usize).collect())).collect()
}

fn of(sequences: &[Sequence], per_wave: usize) -> Vec<Wave> {
    waves(sequences, WaveOptions::Sequences(NonZeroUsize::new(per_wave).unwrap()))
}

fn scorers() -> Vec<Box<dyn Scorer>> {
    let fisher = [Criterion::Token, Criterion::Sequence, Criterion::Abs].map(Fisher::new);
    let fisher = fisher.into_iter().map(|fisher| Box::new(fisher) as Box<dyn Scorer>);
    fisher.chain([Box::new(Activation::default()) as _, Box::new(RouterScore::default()) as _]).collect()
}

fn collection(model: &Model) -> Collection {
    Collection::for_scorers(model.checkpoint().shape(), provenance(), &scorers()).unwrap()
}

fn provenance() -> Provenance {
    Provenance::new("tiny-moe", "seven rows", "{}")
}

#[test]
fn abs_and_sequence_are_those_of_autograd() {
    let (model, bytes) = (model(), reference());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut engine = Engine::new(&model, EngineOptions::default());
    for per_wave in [3, 7] {
        let waves = of(&sequences(&tensors), per_wave);
        let statistics = collect(&mut engine, &mut collection(&model), &waves, None, &mut |_| {}).unwrap();
        for (criterion, name) in [(Criterion::Abs, "abs"), (Criterion::Sequence, "squares")] {
            let table = Fisher::new(criterion).score(&statistics, &NoWeights).unwrap();
            assert_eq!(table.layers.len(), 4);
            for layer in &table.layers {
                let expected = tensors.tensor(&format!("{name}.layer.{}", layer.layer)).unwrap();
                let expected: Vec<f32> =
                    expected.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                let found: Vec<f32> = layer.scores.iter().flatten().copied().collect();
                assert_eq!(found.len(), expected.len());
                let largest = expected.iter().copied().fold(0.0, f32::max);
                let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(
                    difference <= 1e-4 * largest,
                    "{name}, layer {}: differs by {difference}, largest {largest}",
                    layer.layer
                );
            }
        }
        // Scorers that read the router and the weights run as well, and count every token top_k times.
        let table = Activation::default().score(&statistics, model.checkpoint().as_ref()).unwrap();
        let routed: u64 = table.layers[0].routed.as_ref().unwrap().iter().sum();
        assert_eq!(routed, statistics.tokens() * model.checkpoint().shape().top_k as u64);
        RouterScore::default().score(&statistics, model.checkpoint().as_ref()).unwrap();
    }
}

/// Stops after some waves, as a killed process would.
struct Killed<'e, 'm>(&'e mut Engine<'m>, usize);

impl WaveRunner for Killed<'_, '_> {
    fn run(&mut self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<WaveReport> {
        self.1 = self.1.checked_sub(1).ok_or(moe_core::Error::Unsupported("going on".into()))?;
        WaveRunner::run(self.0, wave, observer)
    }
}

#[test]
fn resumed_and_sharded_collections_have_the_bits_of_one_run() {
    let (model, bytes) = (model(), reference());
    let waves = of(&sequences(&SafeTensors::deserialize(&bytes).unwrap()), 2);
    let directory = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let shape = model.checkpoint().shape();
        StatisticsStore::create_or_resume(directory.path().join(name), shape, &provenance()).unwrap()
    };
    let engine = || Engine::new(&model, EngineOptions::default());
    let run = |store: &mut StatisticsStore, waves: &[Wave]| {
        collect(&mut engine(), &mut collection(&model), waves, Some(store), &mut |_| {}).unwrap()
    };

    let whole = run(&mut open("whole"), &waves);
    let mut killed = Killed(&mut engine(), 2);
    collect(&mut killed, &mut collection(&model), &waves, Some(&mut open("resumed")), &mut |_| {}).unwrap_err();
    assert_eq!(open("resumed").waves().len(), 2);
    assert_eq!(run(&mut open("resumed"), &waves), whole);

    run(&mut open("second"), &waves[2..]);
    let mut first = open("first");
    run(&mut first, &waves[..2]);
    first.absorb(directory.path().join("second")).unwrap();
    assert_eq!(first.fold().unwrap(), whole);
}
