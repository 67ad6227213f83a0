//! One calibration for everything that is observed: kept, resumed, shared out and folded to the same bits, and a store
//! of more serves whoever reads less.
#![cfg(feature = "flex")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use burn::tensor::Device;
use moe_checkpoint::{ArrayKind, Fold, Statistics, StatisticsStore};
use moe_core::Model;
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_core::trace::{LayerTrace, Signals, WaveInfo};
use moe_importance::collectors::Collector;
use moe_importance::scorers::{Activation, Esft, Frequency, Reap};
use moe_importance::statistics::{OUTPUT_APPLIED, ROUTED_TOKENS};
use moe_importance::{Calibration, Error, NoWeights, Progress, Scorer, StatisticId, StatisticSpec};
use serde_json::{Value, json};

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(path, &Device::flex(), None).unwrap()
}

fn data(seed: u32) -> Vec<Wave> {
    let sequence = |i: u32| Sequence::new((0..9 + i).map(|t| (t * 31 + i * 7 + seed) % 60).collect());
    waves(&(0..5).map(sequence).collect::<Vec<_>>(), WaveOptions::Sequences(NonZeroUsize::MIN))
}

/// What no collector of the crate sees: the tokens of a layer, and a sample of them, gathered over a wave.
struct Own {
    specs: [StatisticSpec; 2],
    layer: usize,
    seen: f64,
    sampled: Vec<f64>,
    fail_at: Option<u64>,
}

impl Own {
    fn new(layer: usize, fail_at: Option<u64>) -> Self {
        let spec = |id, kind, fold| StatisticSpec { id: StatisticId::new(id), kind, fold };
        let specs = [
            spec("own.tokens", ArrayKind::Matrix { rows: 1, columns: 1 }, Fold::Sum),
            spec("own.sample", ArrayKind::Matrix { rows: 4, columns: 3 }, Fold::Lowest { key: 2 }),
        ];
        Self { specs, layer, seen: 0.0, sampled: Vec::new(), fail_at }
    }
}

impl Collector for Own {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.specs
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn recipe(&self) -> Option<Value> {
        Some(json!({ "own": { "layer": self.layer } }))
    }

    fn begin_wave(&mut self, _: &WaveInfo) -> moe_importance::Result<()> {
        (self.seen, self.sampled) = (0.0, Vec::new());
        Ok(())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, _: &mut Statistics) -> moe_importance::Result<()> {
        if self.fail_at == Some(trace.wave.id) {
            return Err(Error::NoData { what: "a power cut".into(), counted: "volts" });
        }
        if trace.layer == self.layer {
            self.seen += trace.wave.tokens as f64;
            let key = (trace.wave.id * 5 % 7) as f64;
            self.sampled.extend([key, trace.wave.id as f64, f64::from(trace.weights[0])]);
        }
        Ok(())
    }

    fn end_wave(&mut self, _: &WaveInfo, into: &mut Statistics) -> moe_importance::Result<()> {
        into.matrix_mut("own.tokens", [1, 1], Fold::Sum)?[0] += self.seen;
        into.add_rows("own.sample", [4, 3], 2, &self.sampled)?;
        Ok(())
    }
}

fn calibration<'a>(model: &'a Model, waves: &[Wave], fail_at: Option<u64>) -> Calibration<'a> {
    Calibration::of_waves(model, waves)
        .scorers([&Reap::default() as &dyn Scorer, &Activation::default()])
        .collector(Box::new(Own::new(1, fail_at)))
}

#[test]
fn interrupted_shared_and_plain_calibrations_are_one() {
    let (model, waves) = (model(), data(1));
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let whole = calibration(&model, &waves, None).run(&mut |_| {}).unwrap();
    let tokens: usize = waves.iter().map(Wave::tokens).sum();
    assert_eq!(whole.matrix("own.tokens").unwrap(), (&[tokens as f64][..], 1));
    let (sample, _) = whole.matrix("own.sample").unwrap();
    assert_eq!(sample.chunks_exact(3).map(|row| row[1]).collect::<Vec<_>>(), [0.0, 3.0, 2.0, 1.0], "keys 0, 1, 3, 5");

    let error = calibration(&model, &waves, Some(3)).store(at("killed")).run(&mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("a power cut"), "{error}");
    let mut reports: Vec<Progress> = Vec::new();
    let resumed = calibration(&model, &waves, None).store(at("killed")).run(&mut |at| reports.push(*at)).unwrap();
    assert_eq!(resumed, whole);
    assert_eq!((reports[0].waves_done, reports[0].waves_resumed, reports[0].tokens), (3, 3, tokens as u64));
    assert_eq!(reports[0].tokens_done, reports[0].tokens_resumed);
    assert!(reports.len() > 4, "within waves, too");
    assert!(reports.windows(2).all(|pair| pair[0].tokens_done <= pair[1].tokens_done));
    let last = reports.last().unwrap();
    assert_eq!((last.waves_done, last.tokens_done), (5, last.tokens));
    assert!(last.tokens_per_second().unwrap() > 0.0 && last.remaining() == Some(Duration::ZERO));

    let shard = |index| calibration(&model, &waves, None).shard(index, 2).store(at(&format!("shard{index}")));
    for index in 0..2 {
        shard(index).run(&mut |_| {}).unwrap();
    }
    let folded = calibration(&model, &waves, None).store(at("folded")).absorb([at("shard0"), at("shard1")]);
    assert_eq!(folded.run(&mut |_| {}).unwrap(), whole);
    let mut again = Vec::new();
    assert_eq!(calibration(&model, &waves, None).store(at("folded")).run(&mut |at| again.push(*at)).unwrap(), whole);
    assert_eq!((again.len(), again[0].waves_done), (1, 5), "nothing is run twice");
}

#[test]
fn a_store_of_more_serves_any_part_of_it() {
    let (model, waves) = (model(), data(1));
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("statistics");
    // Two waves of everything; then frequency alone goes on, and all scorers can still be asked.
    let two: Vec<Wave> = waves[..2].to_vec();
    let all = [&Reap::default() as &dyn Scorer, &Activation::default(), &Frequency::new(), &Esft::default()];
    let of = |waves: &[Wave]| Calibration::of_waves(&model, waves).scorers(all);
    of(&waves).shard(0, 3).store(&store).run(&mut |_| {}).unwrap();
    let frequency = Calibration::of_waves(&model, &waves).scorers([all[2]]).store(&store);
    frequency.check().unwrap();
    let found = frequency.run(&mut |_| {}).unwrap();
    assert_eq!(found, of(&waves).run(&mut |_| {}).unwrap(), "what was begun is gone on with");
    for scorer in all {
        scorer.score(&found, model.checkpoint().as_ref()).unwrap();
    }
    assert_eq!(StatisticsStore::open(&store).unwrap().waves().len(), 5);

    // Less does not serve more, and says what is missing.
    let less = directory.path().join("less");
    Calibration::of_waves(&model, &waves).statistics([ROUTED_TOKENS]).store(&less).run(&mut |_| {}).unwrap();
    let more = of(&waves).store(&less);
    for error in [more.check().unwrap_err(), more.run(&mut |_| {}).unwrap_err()] {
        let error = error.to_string();
        assert!(
            error.contains("less: its waves hold routing.tokens, routing.weight, but activation.magnitude"),
            "{error}"
        );
        assert!(error.contains(OUTPUT_APPLIED.as_str()), "{error}");
    }
    // Other data, another cut and other parameters are other calibrations.
    for other in [
        of(&data(2)).store(&store),
        of(&two).store(&store),
        of(&waves).collector(Box::new(Own::new(1, None))).store(&store),
    ] {
        assert!(other.run(&mut |_| {}).is_err());
    }
    let own = directory.path().join("own");
    calibration(&model, &waves, None).store(&own).run(&mut |_| {}).unwrap();
    let other = Calibration::of_waves(&model, &waves).collector(Box::new(Own::new(2, None))).store(&own);
    let error = other.run(&mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("recipe"), "{error}");
    // All waves are there: whoever cannot collect them can still read what it needs.
    let reap = Calibration::of_waves(&model, &waves).scorers([all[0]]).store(&own).run(&mut |_| {}).unwrap();
    Reap::default().score(&reap, &NoWeights).unwrap();
}

#[test]
fn what_cannot_be_collected_is_refused_before_the_model_runs() {
    let (model, waves) = (model(), data(1));
    let none = Calibration::of_waves(&model, &[]).statistics([ROUTED_TOKENS]);
    assert!(matches!(none.check(), Err(Error::NoData { counted: "waves", .. })));
    let unknown = Calibration::of_waves(&model, &waves).statistics([StatisticId::new("routing.token")]);
    assert!(matches!(unknown.check(), Err(Error::UnknownStatistic { .. })));
    let twice = calibration(&model, &waves, None).collector(Box::new(Own::new(1, None)));
    assert!(matches!(twice.check(), Err(Error::DuplicateStatistic { id }) if id == "own.tokens"));
    let shard = calibration(&model, &waves, None).shard(3, 3);
    assert!(shard.check().unwrap_err().to_string().contains('3'));
    let error = calibration(&model, &waves, None).absorb(["elsewhere".into()]).run(&mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("found elsewhere, expected none"), "{error}");
}
