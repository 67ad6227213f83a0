//! Calibrations that several ranks share: the bits of one process, whatever their number, with idle ranks, after one
//! has failed, and with stores that all see or that each has.
#![cfg(feature = "flex")]

use std::num::NonZeroUsize;
use std::path::Path;

use burn::tensor::Device;
use moe_checkpoint::group::{Group, Threads};
use moe_checkpoint::{Extent, Fold, Statistics, StatisticsStore};
use moe_core::Model;
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_core::trace::{LayerTrace, Signals};
use moe_importance::statistics::{FISHER_TOKEN, OUTPUT_MAX, OUTPUT_MOMENTS, ROUTED_TOKENS, StatisticId, StatisticSpec};
use moe_importance::{Calibration, Collector, Error, Progress, Result};
use proptest::prelude::*;

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(path, &Device::flex(), None).unwrap()
}

fn data(count: usize, seed: u32) -> Vec<Wave> {
    let sequence = |i: u32| Sequence::new((0..5 + i).map(|t| (t * 31 + i * 7 + seed) % 60).collect());
    let sequences: Vec<Sequence> = (0..count as u32).map(sequence).collect();
    waves(&sequences, WaveOptions::Sequences(NonZeroUsize::MIN))
}

/// Sums, maxima and moments of everything there is a fold for.
fn calibration<'a>(model: &'a Model, waves: &[Wave]) -> Calibration<'a> {
    Calibration::of_waves(model, waves).statistics([FISHER_TOKEN, OUTPUT_MAX, OUTPUT_MOMENTS, ROUTED_TOKENS])
}

/// Stops the rank that runs this wave.
struct Fails {
    at: u64,
    spec: [StatisticSpec; 1],
}

impl Fails {
    fn at(at: Option<u64>) -> Box<Self> {
        let id = StatisticId::new("own.tokens");
        let spec = [StatisticSpec { id, kind: moe_checkpoint::ArrayKind::Expert, fold: Fold::Sum }];
        Box::new(Self { at: at.unwrap_or(u64::MAX), spec })
    }
}

impl Collector for Fails {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.spec
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> Result<()> {
        if trace.wave.id == self.at {
            return Err(Error::NoData { what: "a power cut".into(), counted: "volts" });
        }
        into.expert_mut("own.tokens", Fold::Sum, trace.layer)?[0] += trace.wave.tokens as f64;
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_number_of_ranks_gives_the_bits_of_one(ranks in 1usize..6, count in 1usize..8, seed in 0u32..40, kept: bool) {
        let (model, waves) = (model(), data(count, seed));
        let mut losses = Vec::new();
        let whole = calibration(&model, &waves).run(&mut |at| losses.push(at.loss)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let all = Threads::run(ranks, |group| {
            let mut calibration = calibration(&model, &waves).group(group);
            if kept {
                calibration = calibration.store(directory.path().join("statistics"));
            }
            let mut reports: Vec<Progress> = Vec::new();
            let statistics = calibration.run(&mut |at| reports.push(*at)).unwrap();
            (statistics, reports)
        });
        for (statistics, reports) in all {
            prop_assert_eq!(&statistics, &whole);
            let last = reports.last().unwrap();
            prop_assert_eq!((last.waves_done, last.tokens_done), (count, last.tokens));
            prop_assert!(reports.windows(2).all(|pair| pair[0].tokens_done <= pair[1].tokens_done));
            prop_assert_eq!(&last.loss, losses.last().unwrap(), "the loss to the bit");
        }
        if kept {
            let store = StatisticsStore::open(directory.path().join("statistics")).unwrap();
            prop_assert_eq!(store.fold().unwrap(), whole);
        }
    }
}

#[test]
fn after_a_failure_another_number_of_ranks_goes_on() {
    let (model, waves) = (model(), data(7, 3));
    let with = |at: Option<u64>| calibration(&model, &waves).collector(Fails::at(at));
    let whole = with(None).run(&mut |_| {}).unwrap();
    assert!(whole.vector(OUTPUT_MOMENTS.as_str(), Extent::Moments, 0, 0).is_ok(), "vectors are among them");
    for own_disks in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let at = |rank: usize| directory.path().join(if own_disks { format!("rank{rank}") } else { "all".into() });
        // in the second of two rounds of four
        let all = Threads::run(4, |group| {
            let calibration = with(Some(5)).store(at(group.rank())).group(group);
            calibration.run(&mut |_| {}).unwrap_err().to_string()
        });
        for (rank, error) in all.iter().enumerate() {
            assert!(error.contains("a power cut") && error.starts_with("rank 1: ") == (rank != 1), "{rank}: {error}");
        }
        let all = Threads::run(3, |group| {
            let mut first = None;
            let calibration = with(None).store(at(group.rank())).group(group);
            let statistics = calibration.run(&mut |at| _ = first.get_or_insert(*at)).unwrap();
            (statistics, first.unwrap().waves_resumed)
        });
        for (statistics, resumed) in all {
            assert_eq!(statistics, whole);
            // the whole first round, less the wave on the disk of the rank that is not there any more
            let least = if own_disks { 3 } else { 4 };
            assert!((least..7).contains(&resumed), "{resumed} of 7, own disks: {own_disks}");
        }
    }
}

#[test]
fn a_finished_store_is_folded_by_any_number_of_ranks_without_running_the_model() {
    let (model, waves) = (model(), data(4, 9));
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("statistics");
    let whole = calibration(&model, &waves).store(&store).run(&mut |_| {}).unwrap();
    let all = Threads::run(3, |group| {
        let mut reports = 0;
        // a statistic among those that are there
        let less = Calibration::of_waves(&model, &waves).statistics([ROUTED_TOKENS]).store(&store).group(group);
        (less.run(&mut |_| reports += 1).unwrap(), reports)
    });
    assert!(all.iter().all(|(statistics, reports)| *statistics == whole && *reports == 1));
}

#[test]
fn ranks_that_have_something_else_to_do_are_told_before_the_model_is_run() {
    let (model, few, other) = (model(), data(4, 1), data(4, 2));
    let all = Threads::run(3, |group| {
        let waves = if group.rank() == 2 { &other } else { &few };
        let mut reports = 0;
        let error = calibration(&model, waves).group(group).run(&mut |_| reports += 1).unwrap_err().to_string();
        (error, reports)
    });
    for (error, reports) in all {
        assert!(error.contains("data: found ") && error.contains("on rank 2") && reports == 0, "{error}");
    }
}
