//! The training loop.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{AdamW, Parameters, Schedule};
use crate::{
    data::Wave,
    error::{Error, Result},
};

/// What is trained on waves.
pub trait TrainingTask {
    /// Adds the gradient of the *sum* of the losses over a wave's predicted tokens to `parameters`.
    ///
    /// # Errors
    /// Whatever stops the model.
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss>;

    /// A step is about to be taken; gradients are those of the mean over its predicted tokens, clipped.
    ///
    /// # Errors
    /// Whatever the task refuses.
    fn before_step(&mut self, parameters: &Parameters, at: StepOf) -> Result<()> {
        let _ = (parameters, at);
        Ok(())
    }

    /// A step was taken. Values that have to stay somewhere are put back there.
    ///
    /// # Errors
    /// Whatever the task refuses.
    fn after_step(&mut self, parameters: &mut Parameters, at: StepOf) -> Result<()> {
        let _ = (parameters, at);
        Ok(())
    }

    /// Takes the parameters as they are from now on.
    ///
    /// # Errors
    /// Whatever stops the model.
    fn update(&mut self, parameters: &Parameters) -> Result<()>;

    /// The figure that decides which parameters are best, lower being better.
    ///
    /// # Errors
    /// Whatever stops the model.
    fn evaluate(&mut self) -> Result<f64>;
}

/// A step of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepOf {
    /// Its number, from 1.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
}

/// Loss of some waves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BatchLoss {
    /// Sum over the predicted tokens.
    pub loss: f64,
    /// Predicted tokens.
    pub tokens: usize,
}

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// Passes over the waves.
    pub epochs: usize,
    /// Waves per step: their gradients are added and divided by their predicted tokens.
    pub waves_per_step: usize,
    /// Learning rate.
    pub schedule: Schedule,
    /// Optimiser.
    pub adamw: AdamW,
    /// Largest norm of a step's gradient; longer ones are scaled down. None if not given.
    pub clip: Option<f64>,
    /// Steps between evaluations; the last step is always evaluated.
    pub evaluate_every: usize,
    /// Seed of the order of the waves in each epoch.
    pub seed: u64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            epochs: 3,
            waves_per_step: 1,
            schedule: Schedule::default(),
            adamw: AdamW::default(),
            clip: Some(1.0),
            evaluate_every: 20,
            seed: 0,
        }
    }
}

impl TrainOptions {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        self.adamw.validate()?;
        let counts =
            [("epochs", self.epochs), ("waves_per_step", self.waves_per_step), ("evaluate_every", self.evaluate_every)];
        for (field, count) in counts {
            if count == 0 {
                return Err(Error::input(field, 0, "at least 1"));
            }
        }
        match self.clip {
            Some(clip) if !(clip > 0.0 && clip.is_finite()) => {
                Err(Error::input("clip", clip, "a finite number above 0"))
            }
            _ => Ok(()),
        }
    }

    /// Steps on `waves` waves.
    pub fn steps(&self, waves: usize) -> usize {
        self.epochs * waves.div_ceil(self.waves_per_step.max(1))
    }
}

/// What happened in training, for progress bars and logs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TrainEvent {
    /// A step was taken.
    Step {
        /// Number of the step, from 1.
        step: usize,
        /// Steps in all.
        steps: usize,
        /// Mean loss per predicted token of its waves, before it was taken.
        loss: f64,
        /// Norm of the gradient of that mean, before clipping.
        gradient_norm: f64,
        /// Learning rate.
        learning_rate: f64,
        /// Tokens predicted so far.
        tokens: u64,
        /// Time since the start.
        seconds: f64,
        /// Time to the end, at the speed so far.
        eta_seconds: f64,
    },
    /// The task was evaluated.
    Evaluation {
        /// Steps taken before it.
        step: usize,
        /// The figure.
        value: f64,
        /// Whether it is the lowest so far.
        best: bool,
    },
}

/// Told what happens.
pub type OnEvent<'a> = &'a mut dyn FnMut(&TrainEvent) -> Result<()>;

/// Writes events as lines of JSON.
#[derive(Debug)]
pub struct JsonLines<W>(pub W);

impl<W: Write> JsonLines<W> {
    /// Writes one line.
    ///
    /// # Errors
    /// [`Error::Observer`] if it cannot be written.
    pub fn write(&mut self, event: &TrainEvent) -> Result<()> {
        let line = serde_json::to_string(event).map_err(Error::observer)?;
        writeln!(self.0, "{line}").map_err(Error::observer)
    }
}

/// Parameters that were best, by [`TrainingTask::evaluate`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps taken before; 0 if nothing was better than the start.
    pub step: usize,
    /// The figure.
    pub value: f64,
}

/// What came of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Steps taken.
    pub steps: usize,
    /// The figure before the first step.
    pub before: f64,
    /// The figure after the last step.
    pub last: f64,
    /// The figure of the parameters that were kept.
    pub best: Best,
}

/// Trains `parameters` on `waves`. In the end they, and the task, have the values that were best in any evaluation, the start included.
///
/// # Errors
/// [`Error::Input`] for options out of range, no parameters or no waves, before anything is run; [`Error::NotFinite`] for a loss,
/// gradient or figure that is not finite; what stops the task, and what `on_event` returns.
pub fn train(
    task: &mut dyn TrainingTask,
    parameters: &mut Parameters,
    waves: &[Wave],
    options: &TrainOptions,
    on_event: OnEvent<'_>,
) -> Result<TrainReport> {
    options.validate()?;
    if parameters.is_empty() {
        return Err(Error::input("trainable parameters", 0, "at least one"));
    }
    if waves.is_empty() {
        return Err(Error::input("training waves", 0, "at least one"));
    }
    let start = Instant::now();
    let steps = options.steps(waves.len());
    let mut order = ChaCha8Rng::seed_from_u64(options.seed);
    task.update(parameters)?;
    let mut keeper = Keeper::new(task, parameters, on_event)?;
    let (mut step, mut tokens) = (0, 0);
    for _ in 0..options.epochs {
        let mut epoch: Vec<&Wave> = waves.iter().collect();
        epoch.shuffle(&mut order);
        for batch in epoch.chunks(options.waves_per_step) {
            step += 1;
            parameters.clear_gradients();
            let mut total = BatchLoss::default();
            for wave in batch {
                let BatchLoss { loss, tokens } = task.accumulate(wave, parameters)?;
                total = BatchLoss { loss: total.loss + loss, tokens: total.tokens + tokens };
            }
            let mean = 1.0 / total.tokens.max(1) as f64;
            parameters.scale_gradients(mean as f32);
            let gradient_norm = parameters.gradient_norm();
            if !(total.loss.is_finite() && gradient_norm.is_finite()) {
                return Err(Error::NotFinite { what: format!("loss or gradient of step {step}"), wave: batch[0].id });
            }
            if let Some(clip) = options.clip.filter(|clip| gradient_norm > *clip) {
                parameters.scale_gradients((clip / gradient_norm) as f32);
            }
            let learning_rate = options.schedule.rate(step, steps);
            task.before_step(parameters, StepOf { step, steps })?;
            options.adamw.step(parameters, step, learning_rate);
            task.after_step(parameters, StepOf { step, steps })?;
            task.update(parameters)?;
            tokens += total.tokens as u64;
            let seconds = start.elapsed().max(Duration::from_nanos(1)).as_secs_f64();
            (keeper.on_event)(&TrainEvent::Step {
                step,
                steps,
                loss: total.loss * mean,
                gradient_norm,
                learning_rate,
                tokens,
                seconds,
                eta_seconds: seconds / step as f64 * (steps - step) as f64,
            })?;
            if step.is_multiple_of(options.evaluate_every) || step == steps {
                keeper.evaluate(task, parameters, step)?;
            }
        }
    }
    let Keeper { before, last, best, values, .. } = keeper;
    parameters.restore(values);
    parameters.clear_gradients();
    task.update(parameters)?;
    Ok(TrainReport { steps, before, last, best })
}

/// Keeps the best parameters.
struct Keeper<'a> {
    before: f64,
    last: f64,
    best: Best,
    values: Vec<Vec<f32>>,
    on_event: OnEvent<'a>,
}

impl<'a> Keeper<'a> {
    fn new(task: &mut dyn TrainingTask, parameters: &Parameters, on_event: OnEvent<'a>) -> Result<Self> {
        let before = figure(task, 0)?;
        on_event(&TrainEvent::Evaluation { step: 0, value: before, best: true })?;
        let best = Best { step: 0, value: before };
        Ok(Self { before, last: before, best, values: parameters.snapshot(), on_event })
    }

    fn evaluate(&mut self, task: &mut dyn TrainingTask, parameters: &Parameters, step: usize) -> Result<()> {
        self.last = figure(task, step)?;
        let best = self.last < self.best.value;
        if best {
            self.best = Best { step, value: self.last };
            self.values = parameters.snapshot();
        }
        (self.on_event)(&TrainEvent::Evaluation { step, value: self.last, best })
    }
}

fn figure(task: &mut dyn TrainingTask, step: usize) -> Result<f64> {
    let value = task.evaluate()?;
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::input(format!("evaluation after step {step}"), value, "a finite number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sequence;

    /// Each wave pulls `w` towards the value of its first token; the figure is the distance from 3.
    struct Pull {
        w: f32,
        seen: Vec<u64>,
        updates: usize,
        /// Norm of the gradient before each step.
        norms: Vec<f64>,
        /// `w` is not to go beyond.
        limit: f32,
    }

    impl TrainingTask for Pull {
        fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
            self.seen.push(wave.id);
            let difference = self.w - wave.sequences[0].ids[0] as f32;
            let tokens = wave.loss_tokens();
            parameters.get_mut("w").unwrap().gradient[0] += difference * tokens as f32;
            Ok(BatchLoss { loss: f64::from(difference * difference) / 2.0 * tokens as f64, tokens })
        }
        fn before_step(&mut self, parameters: &Parameters, at: StepOf) -> Result<()> {
            assert_eq!((at.step, at.steps), (self.norms.len() + 1, 20));
            self.norms.push(parameters.gradient_norm());
            Ok(())
        }
        fn after_step(&mut self, parameters: &mut Parameters, _: StepOf) -> Result<()> {
            let w = &mut parameters.get_mut("w").unwrap().values[0];
            *w = w.min(self.limit);
            Ok(())
        }
        fn update(&mut self, parameters: &Parameters) -> Result<()> {
            self.w = parameters.get("w").unwrap().values[0];
            self.updates += 1;
            Ok(())
        }
        fn evaluate(&mut self) -> Result<f64> {
            Ok(f64::from((self.w - 3.0).abs()))
        }
    }

    fn waves() -> Vec<Wave> {
        (0..6u64).map(|id| Wave { id, sequences: vec![Sequence::new(vec![3 + (id % 2) as u32 * 2, 0])] }).collect()
    }

    fn pull(options: &TrainOptions) -> (Pull, Parameters, TrainReport, Vec<TrainEvent>) {
        pull_up_to(options, f32::INFINITY)
    }

    fn pull_up_to(options: &TrainOptions, limit: f32) -> (Pull, Parameters, TrainReport, Vec<TrainEvent>) {
        let mut task = Pull { w: 0.0, seen: Vec::new(), updates: 0, norms: Vec::new(), limit };
        let mut parameters = Parameters::new();
        parameters.insert("w", vec![0.0]);
        let mut events = Vec::new();
        let mut log = |event: &TrainEvent| {
            events.push(*event);
            Ok(())
        };
        let report = train(&mut task, &mut parameters, &waves(), options, &mut log).unwrap();
        (task, parameters, report, events)
    }

    fn options() -> TrainOptions {
        let schedule = Schedule { peak: 0.5, warmup: 0.0, ..Schedule::default() };
        TrainOptions { epochs: 10, waves_per_step: 4, schedule, evaluate_every: 1, seed: 7, ..TrainOptions::default() }
    }

    #[test]
    fn the_best_parameters_are_kept() {
        let (task, parameters, report, events) = pull(&options());
        assert_eq!((report.steps, report.before), (20, 3.0));
        // the waves pull towards 4, the figure is best at 3
        assert!(report.best.value < 0.3 && report.best.value < report.last, "{report:?}");
        assert!((f64::from((task.w - 3.0).abs()) - report.best.value).abs() < 1e-6);
        assert_eq!(parameters.get("w").unwrap().values, [task.w]);
        let lowest = events.iter().filter_map(|event| match event {
            TrainEvent::Evaluation { value, .. } => Some(*value),
            TrainEvent::Step { .. } => None,
        });
        assert_eq!(lowest.fold(f64::INFINITY, f64::min), report.best.value);
        assert_eq!(task.updates, 22);
    }

    #[test]
    fn epochs_are_shuffled_by_the_seed_and_runs_repeat() {
        let (first, parameters, report, events) = pull(&options());
        let (again, same_parameters, same_report, same_events) = pull(&options());
        assert_eq!((&first.seen, &parameters, &report), (&again.seen, &same_parameters, &same_report));
        assert_eq!(events.len(), same_events.len());
        for epoch in first.seen.chunks(6) {
            let mut ids = epoch.to_vec();
            ids.sort();
            assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
        }
        assert_ne!(first.seen[..6], first.seen[6..12]);
        assert_ne!(first.seen, pull(&TrainOptions { seed: 8, ..options() }).0.seen);
        match events[1] {
            TrainEvent::Step { step, steps, loss, gradient_norm, learning_rate, tokens, .. } => {
                let values: f64 = first.seen[..4].iter().map(|id| 3.0 + (id % 2) as f64 * 2.0).sum::<f64>() / 4.0;
                assert_eq!((step, steps, tokens), (1, 20, 4));
                assert!((gradient_norm - values).abs() < 1e-6 && loss > 0.0 && learning_rate <= 0.5);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_task_sees_gradients_before_a_step_and_may_move_values_after_it() {
        let (task, _, report, events) = pull_up_to(&options(), 1.5);
        assert_eq!((task.norms.len(), report.last), (20, 1.5));
        assert!(task.norms.iter().all(|norm| *norm <= 1.0 + 1e-6), "{:?}", task.norms);
        let clipped = events.iter().filter_map(|event| match event {
            TrainEvent::Step { gradient_norm, .. } => Some(gradient_norm.min(1.0)),
            TrainEvent::Evaluation { .. } => None,
        });
        assert!(clipped.zip(&task.norms).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn events_are_lines_of_json() {
        let mut lines = JsonLines(Vec::new());
        let events = [
            TrainEvent::Evaluation { step: 2, value: 0.5, best: true },
            TrainEvent::Step {
                step: 3,
                steps: 4,
                loss: 1.5,
                gradient_norm: 2.0,
                learning_rate: 0.1,
                tokens: 9,
                seconds: 3.0,
                eta_seconds: 1.0,
            },
        ];
        events.iter().for_each(|event| lines.write(event).unwrap());
        let text = String::from_utf8(lines.0).unwrap();
        let read: Vec<TrainEvent> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, events);
        assert!(text.starts_with(r#"{"event":"evaluation","step":2"#), "{text}");
    }

    #[test]
    fn bad_options_are_named_before_anything_runs() {
        let mut task = Pull { w: 0.0, seen: Vec::new(), updates: 0, norms: Vec::new(), limit: f32::INFINITY };
        let mut message = |options: TrainOptions, waves: &[Wave], mut parameters: Parameters| {
            train(&mut task, &mut parameters, waves, &options, &mut |_| Ok(())).unwrap_err().to_string()
        };
        let parameters = || {
            let mut parameters = Parameters::new();
            parameters.insert("w", vec![0.0]);
            parameters
        };
        assert!(message(TrainOptions { epochs: 0, ..options() }, &waves(), parameters()).contains("epochs"));
        assert!(message(TrainOptions { clip: Some(-1.0), ..options() }, &waves(), parameters()).contains("clip"));
        assert!(message(options(), &[], parameters()).contains("training waves"));
        assert!(message(options(), &waves(), Parameters::new()).contains("trainable parameters"));
        assert_eq!(task.updates, 0);
    }
}
