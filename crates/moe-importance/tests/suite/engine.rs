//! Scores of the bundled tiny-moe checkpoint through the engine, against PyTorch's autograd, and the bits of
//! interrupted and shared collections.
#![cfg(feature = "flex")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use moe_checkpoint::{ArrayKind, Extent, Provenance, Statistics, StatisticsStore};
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_core::trace::Observer;
use moe_core::{Engine, EngineOptions, Model, WaveReport};
use moe_importance::scorers::{Activation, Criterion, Fisher, RouterForm, RouterScore, RouterTaylor};
use moe_importance::statistics::{OUTPUT_MOMENTS, ROUTER_GRADIENT_SQUARES};
use moe_importance::{Collection, NoWeights, Scorer, StatisticId, WaveRunner, collect};
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

fn collection(model: &Model) -> Collection<'_> {
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

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Relative to the largest value of the layer.
fn assert_close(found: impl IntoIterator<Item = f64>, expected: &[f32], what: &str) {
    let found: Vec<f64> = found.into_iter().collect();
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let difference = found.iter().zip(expected).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
    assert!(difference <= 1e-4 * f64::from(largest), "{what}: differs by {difference}, largest {largest}");
}

/// All values of a layer.
fn values(statistics: &Statistics, id: &str, layer: usize) -> Vec<f64> {
    let expert = |e: usize| match statistics.kind(id).unwrap() {
        ArrayKind::Unit => statistics.unit(id, layer, e).unwrap().to_vec(),
        ArrayKind::Expert => vec![statistics.expert(id, layer).unwrap()[e]],
        kind => panic!("{kind:?}"),
    };
    (0..statistics.shape().layer(layer).unwrap().num_experts()).flat_map(expert).collect()
}

#[test]
fn sums_over_units_outputs_and_router_rows_are_those_of_autograd() {
    let (model, bytes) = (model(), reference());
    let expected = std::fs::read(path("tests/fixtures/tiny_moe_statistics.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let plain = [
        "activation.square",
        "activation.magnitude_weighted",
        "gradient.square",
        "taylor.sum",
        "taylor.magnitude",
        "taylor.square",
        "projection.sum",
        "output.norm",
        "output.norm_applied",
        "output.max",
        "router_gradient.abs",
        "router_gradient.square",
    ];
    let ids: Vec<StatisticId> = plain
        .iter()
        .map(|id| StatisticId::from(id.to_string()))
        .chain([OUTPUT_MOMENTS, ROUTER_GRADIENT_SQUARES])
        .collect();
    let ids = [ids, RouterTaylor::default().needs().statistics].concat();
    let waves = of(&sequences(&SafeTensors::deserialize(&bytes).unwrap()), 3);
    let shape = model.checkpoint().shape();
    let mut collection = Collection::new(shape, provenance(), &ids).unwrap();
    let mut engine = Engine::new(&model, EngineOptions::default());
    let statistics = collect(&mut engine, &mut collection, &waves, None, &mut |_| {}).unwrap();
    let taylor = RouterTaylor::new(RouterForm::Taylor).score(&statistics, model.checkpoint().as_ref()).unwrap();
    for (position, layer) in shape.layers.iter().enumerate() {
        let name = |id: &str| format!("{id}.layer.{}", layer.layer);
        for id in plain {
            assert_close(values(&statistics, id, layer.layer), &floats(&expected, &name(id)), &name(id));
        }
        let hidden = shape.hidden_size;
        let moments: Vec<&[f64]> = (0..layer.num_experts())
            .map(|e| statistics.vector(OUTPUT_MOMENTS.as_str(), Extent::Moments, layer.layer, e).unwrap())
            .collect();
        for (id, part) in [("output.mean", 1..1 + hidden), ("output.deviations", 1 + hidden..1 + 2 * hidden)] {
            let found = moments.iter().flat_map(|moments| moments[part.clone()].to_vec());
            assert_close(found, &floats(&expected, &name(id)), &name(id));
        }
        // Root mean square over the seven sequences of the norm of row times gradient.
        let squares = floats(&expected, &name("router_gradient.weighted_square"));
        let roots: Vec<f32> = squares.iter().map(|sum| (sum / 7.0).sqrt()).collect();
        assert_close(taylor.layers[position].scores.concat().into_iter().map(f64::from), &roots, &name("taylor"));
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
