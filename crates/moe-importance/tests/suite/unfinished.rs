//! A wave that is stopped in its middle goes on with the layer it was in, to the same bits.
#![cfg(feature = "flex")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use moe_checkpoint::{ArrayKind, Fold, Statistics, StatisticsStore};
use moe_core::Model;
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_core::trace::{ExpertTrace, LayerTrace, Signals, WaveInfo};
use moe_importance::collectors::Collector;
use moe_importance::statistics::{FISHER_TOKEN, OUTPUT_SOFTMAX, ROUTER_GRADIENT_SQUARES};
use moe_importance::{Calibration, Error, Progress, StatisticId, StatisticSpec};

/// Where a run is stopped: in a layer of the forward or the backward sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Forward(usize),
    Backward(usize),
}

/// Passes layers, and is stopped in one of them in the second wave, with what it has seen of the layer half told.
struct Stopped {
    specs: [StatisticSpec; 2],
    needs: Signals,
    at: Option<At>,
    wave: u64,
    passed: Arc<Mutex<Vec<At>>>,
    kept: Vec<f64>,
}

impl Stopped {
    fn new(needs: Signals, at: Option<At>) -> (Self, Arc<Mutex<Vec<At>>>) {
        let matrix = StatisticSpec {
            id: StatisticId::new("stopped.matrix"),
            kind: ArrayKind::Matrix { rows: 1, columns: 2 },
            fold: Fold::Sum,
        };
        let specs = [StatisticSpec::expert_sum(StatisticId::new("stopped.tokens")), matrix];
        let passed = Arc::new(Mutex::new(Vec::new()));
        (Self { specs, needs, at, wave: 0, passed: passed.clone(), kept: Vec::new() }, passed)
    }

    fn pass(&self, here: At) -> moe_importance::Result<()> {
        let mut passed = self.passed.lock().unwrap();
        if self.wave == 1 && passed.last() != Some(&here) {
            passed.push(here);
        }
        match self.wave == 1 && self.at == Some(here) {
            true => Err(Error::NoData { what: format!("{here:?}"), counted: "volts" }),
            false => Ok(()),
        }
    }
}

impl Collector for Stopped {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.specs
    }

    fn needs(&self) -> Signals {
        self.needs
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_importance::Result<()> {
        self.wave = wave.id;
        self.kept.clear();
        Ok(())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> moe_importance::Result<()> {
        into.expert_mut("stopped.tokens", Fold::Sum, trace.layer)?[0] += 1.0;
        self.pass(At::Forward(trace.layer))
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> moe_importance::Result<()> {
        into.expert_mut("stopped.tokens", Fold::Sum, trace.layer)?[trace.expert] += trace.rows.len() as f64;
        self.kept.push(f64::from(trace.routing_weights[0]));
        match trace.backward {
            Some(_) => self.pass(At::Backward(trace.layer)),
            None => Ok(()),
        }
    }

    fn end_layer(&mut self, _: usize, into: &mut Statistics) -> moe_importance::Result<()> {
        let matrix = into.matrix_mut("stopped.matrix", [1, 2], Fold::Sum)?;
        matrix[0] += self.kept.len() as f64;
        matrix[1] += self.kept.drain(..).sum::<f64>();
        Ok(())
    }
}

fn model(max_memory: Option<u64>) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(path, &Device::flex(), max_memory).unwrap()
}

fn data() -> Vec<Wave> {
    let sequence = |i: u32| Sequence::new((0..9 + i).map(|t| (t * 31 + i * 7) % 60).collect());
    waves(&(0..6).map(sequence).collect::<Vec<_>>(), WaveOptions::Sequences(2.try_into().unwrap()))
}

fn calibration<'a>(
    model: &'a Model,
    waves: &[Wave],
    needs: Signals,
    at: Option<At>,
) -> (Calibration<'a>, Arc<Mutex<Vec<At>>>) {
    let (stopped, passed) = Stopped::new(needs, at);
    // Gates of the forward sweep are used in the backward sweep; squares of router gradients come after experts.
    let ids = match needs.gradients {
        true => vec![FISHER_TOKEN, OUTPUT_SOFTMAX, ROUTER_GRADIENT_SQUARES],
        false => vec![OUTPUT_SOFTMAX],
    };
    (Calibration::of_waves(model, waves).statistics(ids).collector(Box::new(stopped)), passed)
}

fn moe_layers(model: &Model) -> Vec<usize> {
    model.checkpoint().shape().layers.iter().map(|layer| layer.layer).collect()
}

#[test]
fn stopped_in_any_layer_a_run_does_at_most_one_layer_again_to_the_same_bits() {
    let (model, waves) = (model(None), data());
    let layers = moe_layers(&model);
    assert!(layers.len() >= 3);
    let forward = Signals::ROUTING | Signals::OUTPUTS;
    let backward = Signals { gradients: true, units: true, ..forward };
    for needs in [forward, backward] {
        let (whole, all) = calibration(&model, &waves, needs, None);
        let whole = whole.run(&mut |_| {}).unwrap();
        let all = all.lock().unwrap().clone();
        let stops = layers.iter().map(|layer| At::Forward(*layer));
        let back = layers.iter().rev().filter(|_| needs.gradients).map(|layer| At::Backward(*layer));
        let stops: Vec<At> = stops.chain(back).collect();
        assert_eq!(all, stops);
        for (place, at) in stops.iter().enumerate() {
            let directory = tempfile::tempdir().unwrap();
            let store = directory.path().join("statistics");
            let (first, seen) = calibration(&model, &waves, needs, Some(*at));
            let error = first.store(&store).run(&mut |_| {}).unwrap_err().to_string();
            assert!(error.contains(&format!("{at:?}")), "{error}");
            assert_eq!(*seen.lock().unwrap(), stops[..=place]);
            let held = StatisticsStore::open(&store).unwrap();
            assert!(held.waves().len() == 1 && held.unfinished(1).is_dir());
            drop(held);

            // The second run may have less memory, and is killed in the same place once more.
            let less = self::model(Some(180_000_000));
            let (again, seen) = calibration(&less, &waves, needs, Some(*at));
            let error = again.store(&store).run(&mut |_| {}).unwrap_err().to_string();
            assert!(error.contains(&format!("{at:?}")), "{error}");
            assert_eq!(*seen.lock().unwrap(), [*at], "{at:?}: goes on with the layer it was in");

            let mut reports: Vec<Progress> = Vec::new();
            let (last, seen) = calibration(&model, &waves, needs, None);
            let resumed = last.store(&store).run(&mut |at| reports.push(*at)).unwrap();
            assert_eq!(resumed, whole, "{at:?}");
            assert_eq!(*seen.lock().unwrap(), stops[place..], "{at:?}: one layer is done twice, the one it was in");
            let end = reports.last().unwrap();
            assert_eq!(end.tokens_done, end.tokens);
            let first_wave = waves[0].tokens() as u64;
            assert_eq!(end.tokens_resumed > first_wave, place > 0, "{at:?}: {end:?}");
            assert!(end.loss.is_some() == needs.gradients);
            assert!(!StatisticsStore::open(&store).unwrap().unfinished(1).exists(), "deleted with the end of the wave");
        }
    }
}

#[test]
fn what_is_left_of_a_wave_is_checked_before_it_is_gone_on_with() {
    let (model, waves) = (model(None), data());
    let layers = moe_layers(&model);
    let needs = Signals { gradients: true, units: true, ..Signals::ROUTING };
    let whole = calibration(&model, &waves, needs, None).0.run(&mut |_| {}).unwrap();
    let at = At::Backward(layers[1]);
    let left = |store: &Path| StatisticsStore::open(store).unwrap().unfinished(1);
    let named = |dir: &Path, name: &str| -> PathBuf {
        let mut found: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.sort();
        let starts = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(name);
        found.into_iter().find(starts).unwrap_or_else(|| panic!("no {name} in {}", dir.display()))
    };
    let anew = At::Forward(layers[0]);
    let cases = [
        ("nothing", at),
        ("middle", anew),
        // Without the gradient, the forward sweep is gone on with from the last input that is left.
        ("gradient", At::Forward(layers[1])),
        ("forward", anew),
        ("wave.json", anew),
        ("loss.json", anew),
    ];
    for (harm, goes_on) in cases {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("statistics");
        calibration(&model, &waves, needs, Some(at)).0.store(&store).run(&mut |_| {}).unwrap_err();
        if harm != "nothing" {
            // What a power cut leaves of a file.
            let path = named(&left(&store), harm);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        }
        let (again, seen) = calibration(&model, &waves, needs, None);
        assert_eq!(again.store(&store).run(&mut |_| {}).unwrap(), whole, "{harm}");
        assert_eq!(seen.lock().unwrap()[0], goes_on, "{harm}");
    }
    // What was kept for other statistics is not gone on with.
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("statistics");
    calibration(&model, &waves, needs, Some(at)).0.store(&store).run(&mut |_| {}).unwrap_err();
    fs::rename(left(&store), left(&store).with_file_name("unfinished-000002")).unwrap();
    let (again, seen) = calibration(&model, &waves, needs, None);
    assert_eq!(again.store(&store).run(&mut |_| {}).unwrap(), whole);
    assert_eq!(seen.lock().unwrap()[0], At::Forward(layers[0]));
}
