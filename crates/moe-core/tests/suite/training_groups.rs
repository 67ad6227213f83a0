//! Training that the ranks of a group share: the bits of one process for any number of them, also when it goes on with
//! another number.

use std::path::Path;

use moe_checkpoint::group::{Group, Threads};
use moe_core::data::{Sequence, Wave};
use moe_core::train::{
    AdamW, BatchLoss, Lamb, Optimizer, Parameters, Saving, Schedule, TrainEvent, TrainOptions, TrainReport,
    TrainingTask, train_in_group, train_saved,
};
use moe_core::{Error, Result};
use proptest::prelude::*;

/// Gradients of very different sizes from every wave, so that their order shows; one parameter has none of some waves.
struct Pull {
    shareable: bool,
    fail_at: Option<u64>,
}

const PULL: Pull = Pull { shareable: true, fail_at: None };

impl TrainingTask for Pull {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
        if self.fail_at == Some(wave.id) {
            return Err(Error::observer("a power cut"));
        }
        let names: Vec<String> = parameters.iter().map(|(name, _)| name.to_string()).collect();
        let mut loss = 0.0;
        for (place, name) in names.iter().enumerate().filter(|(place, _)| *place != 1 || wave.id.is_multiple_of(2)) {
            let values = parameters.get(name).unwrap().values.clone();
            let Some(gradient) = parameters.gradient_mut(name) else { continue };
            for (i, (gradient, value)) in gradient.iter_mut().zip(values).enumerate() {
                let size = 10f32.powi((wave.id as i32 * 5 + i as i32) % 9 - 4);
                let difference = value - (i + place) as f32 / 7.0;
                *gradient += difference * size;
                loss += f64::from(difference * size);
            }
        }
        Ok(BatchLoss { loss: loss.abs(), tokens: wave.loss_tokens() })
    }

    fn update(&mut self, _: &Parameters) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> Result<f64> {
        Ok(parameters.iter().flat_map(|(_, p)| &p.values).map(|v| f64::from(v.abs())).sum())
    }

    fn is_shareable(&self) -> bool {
        self.shareable
    }
}

fn waves(count: u64) -> Vec<Wave> {
    (0..count).map(|id| Wave { id, sequences: vec![Sequence::new(vec![1; 2 + id as usize % 3])] }).collect()
}

fn start() -> Parameters {
    let mut parameters = Parameters::new();
    for (name, len) in [("a", 5), ("b", 9), ("c", 1), ("d", 4)] {
        parameters.insert(name, (0..len).map(|i| i as f32 / 3.0 - 0.5).collect());
    }
    parameters
}

fn options(waves_per_step: usize, optimizer: Optimizer) -> TrainOptions {
    let schedule = Schedule { peak: 0.05, ..Schedule::default() };
    TrainOptions { epochs: 3, waves_per_step, schedule, optimizer, evaluate_every: Some(2), ..TrainOptions::default() }
}

/// Values and report as exact numbers.
fn exact(parameters: &Parameters, report: &TrainReport) -> String {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let values: Vec<_> = parameters.iter().map(|(name, p)| (name, bits(&p.values))).collect();
    format!("{values:?} {report:?}")
}

fn one(waves: &[Wave], options: &TrainOptions, saving: Option<&Saving>) -> String {
    let mut parameters = start();
    let report = train_saved(&mut { PULL }, &mut parameters, waves, options, saving, &mut |_| Ok(())).unwrap();
    exact(&parameters, &report)
}

fn in_group(
    group: &dyn Group,
    mut task: Pull,
    waves: &[Wave],
    options: &TrainOptions,
    saving: Option<&Saving>,
    stop_at: Option<usize>,
) -> Result<(String, usize)> {
    let mut parameters = start();
    let mut stop = |event: &TrainEvent| match event {
        TrainEvent::Step { step, .. } if Some(*step) == stop_at && group.rank() == 1 => Err(Error::observer("killed")),
        _ => Ok(()),
    };
    let report = train_in_group(group, &mut task, &mut parameters, waves, options, saving, &mut stop)?;
    let moments = parameters.iter().filter(|(_, p)| p.state().bytes() > 0).count();
    Ok((exact(&parameters, &report), moments))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_number_of_ranks_trains_to_the_bits_of_one(
        ranks in 1usize..6, count in 1u64..8, per_step in 1usize..6, lamb: bool,
    ) {
        let optimizer = match lamb {
            true => Optimizer::Lamb(Lamb { weight_decay: 0.1, ..Lamb::default() }),
            false => Optimizer::AdamW(AdamW { weight_decay: 0.1, ..AdamW::default() }),
        };
        let (waves, options) = (waves(count), options(per_step, optimizer));
        let whole = one(&waves, &options, None);
        let all = Threads::run(ranks, |group| in_group(group, PULL, &waves, &options, None, None).unwrap());
        for (found, moments) in &all {
            prop_assert_eq!(found, &whole);
            prop_assert!(*moments <= 4usize.div_ceil(ranks) + 1, "{} of 4 parameters have moments here", moments);
        }
        prop_assert!(all.iter().map(|(_, moments)| moments).sum::<usize>() <= 4, "no moment is kept twice");
    }
}

#[test]
fn another_number_of_ranks_goes_on_with_a_saved_state() {
    let (waves, options) = (waves(7), options(3, Optimizer::default()));
    let whole = one(&waves, &options, None);
    let directory = tempfile::tempdir().unwrap();
    let saving = |name: &str| Saving::new(Path::new(directory.path()).join(name), 2);
    for (before, after) in [(4, 3), (1, 5), (3, 1)] {
        let saving = saving(&format!("{before}-{after}"));
        // the rank that stops takes all others with it
        let all = Threads::run(before.max(2), |group| in_group(group, PULL, &waves, &options, Some(&saving), Some(5)));
        for error in all.into_iter().map(|outcome| outcome.unwrap_err().to_string()) {
            assert!(error.contains("killed"), "{error}");
        }
        let all = Threads::run(after, |group| in_group(group, PULL, &waves, &options, Some(&saving), None).unwrap());
        assert!(all.iter().all(|(found, _)| *found == whole), "{before}, then {after}");
        assert_eq!(one(&waves, &options, Some(&saving)), whole, "nothing is left to do");
    }
}

#[test]
fn what_cannot_be_shared_out_is_refused_and_a_failure_stops_all() {
    let (waves, options) = (waves(5), options(4, Optimizer::default()));
    let outcome = |task: fn() -> Pull| {
        let all = Threads::run(3, |group| in_group(group, task(), &waves, &options, None, None));
        all.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect::<Vec<_>>()
    };
    let refused = outcome(|| Pull { shareable: false, ..PULL });
    assert!(refused.iter().all(|error| error.contains("found 3, expected one")), "{refused:?}");
    let failed = outcome(|| Pull { fail_at: Some(3), ..PULL });
    assert!(failed.iter().all(|error| error.contains("a power cut")), "{failed:?}");
    assert_eq!(failed.iter().filter(|error| error.starts_with("rank ")).count(), 2, "{failed:?}");
    let other = Threads::run(2, |group| {
        let waves = if group.rank() == 1 { &waves[..4] } else { &waves };
        in_group(group, PULL, waves, &options, None, None).unwrap_err().to_string()
    });
    assert!(other.iter().all(|error| error.contains("training: found")), "{other:?}");
}
