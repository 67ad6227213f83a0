//! The training loop.

use std::time::{Duration, Instant};

use moe_checkpoint::group::{Alone, Group};
use serde::{Deserialize, Serialize};

use super::keeper::{Best, Keeper};
use super::order::Order;
use super::state::{Bits, Progress, Saved, StateDir, signature};
use super::together;
use super::{BatchLoss, OnEvent, Parameters, Saving, Stop, TrainEvent, TrainOptions, TrainingTask};
use crate::data::Wave;
use crate::error::{Error, Result};
use crate::memory::process_memory;

/// What came of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Steps taken.
    pub steps: usize,
    /// Why there were no more.
    pub stop: Stop,
    /// The figure before the first step. None without evaluations.
    pub before: Option<f64>,
    /// The figure after the last step. None without evaluations.
    pub last: Option<f64>,
    /// The lowest figure. None without evaluations.
    pub best: Option<Best>,
}

/// Trains `parameters` on `waves`, without saving anything. In the end they, and the task, have the values that
/// [`Keep`](super::Keep) asks for.
///
/// # Errors
/// [`Error::Input`] for options out of range, no parameters or no waves, before anything is run, and for an evaluation
/// that is not finite; [`Error::Diverged`] for a loss or gradient that is not finite, or a loss that explodes;
/// [`Error::NoGradient`] if the first ten steps, or all of fewer, brought no parameter any gradient; what stops the
/// task, and what `on_event` returns.
pub fn train(
    task: &mut dyn TrainingTask,
    parameters: &mut Parameters,
    waves: &[Wave],
    options: &TrainOptions,
    on_event: OnEvent<'_>,
) -> Result<TrainReport> {
    train_saved(task, parameters, waves, options, None, on_event)
}

/// Trains like [`train`], and saves the whole state of training now and then, so that a process that was killed at any
/// time goes on from there: the result is bit by bit that of a process that was not. It is called again with the same
/// arguments, the parameters as they were at the start; what they become is in the state.
///
/// # Errors
/// Those of [`train`]; [`Error::State`] names what differs in a state of other options, data or parameters;
/// [`Error::Io`].
pub fn train_saved(
    task: &mut dyn TrainingTask,
    parameters: &mut Parameters,
    waves: &[Wave],
    options: &TrainOptions,
    saving: Option<&Saving>,
    on_event: OnEvent<'_>,
) -> Result<TrainReport> {
    train_in_group(&Alone, task, parameters, waves, options, saving, on_event)
}

/// Trains like [`train_saved`], with the other ranks of a group, which all call it with the same: the waves of a step
/// are shared out, and so are the parameters with their moments, each to the one rank that takes its steps. Every rank
/// is left with all values, which have the same bits for any number of ranks; the first one saves the states, in a
/// directory that all see.
///
/// # Errors
/// Those of [`train_saved`]; [`Error::Input`] for a [task](TrainingTask::is_shareable) that cannot be shared out, and
/// for states that not all ranks see; what has stopped another rank.
pub fn train_in_group(
    group: &dyn Group,
    task: &mut dyn TrainingTask,
    parameters: &mut Parameters,
    waves: &[Wave],
    options: &TrainOptions,
    saving: Option<&Saving>,
    on_event: OnEvent<'_>,
) -> Result<TrainReport> {
    group.agree(train_on_this_rank(group, task, parameters, waves, options, saving, on_event))
}

fn train_on_this_rank(
    group: &dyn Group,
    task: &mut dyn TrainingTask,
    parameters: &mut Parameters,
    waves: &[Wave],
    options: &TrainOptions,
    saving: Option<&Saving>,
    on_event: OnEvent<'_>,
) -> Result<TrainReport> {
    options.validate()?;
    if group.size() > 1 && !task.is_shareable() {
        return Err(Error::input("processes that train together", group.size(), "one: this is not shared out"));
    }
    if parameters.is_empty() {
        return Err(Error::input("trainable parameters", 0, "at least one"));
    }
    if waves.is_empty() {
        return Err(Error::input("training waves", 0, "at least one"));
    }
    parameters.check_returned()?;
    let names: Vec<&str> = parameters.iter().map(|(name, _)| name).collect();
    options.check_groups(&names)?;
    let mut directory = None;
    if saving.is_some() || group.size() > 1 {
        let signature = signature(options, waves, parameters)?;
        if group.size() > 1 {
            group.same("training", &blake3::hash(signature.to_string().as_bytes()).to_hex())?;
        }
        directory = match saving {
            Some(saving) if group.rank() == 0 => Some(StateDir::open(saving, signature)?),
            Some(saving) => Some(StateDir::of_first_rank(saving, signature)),
            None => None,
        };
        // Nobody looks for states before the first has opened the directory.
        group.check(None)?;
    }
    let every = saving.and_then(|saving| saving.every);
    let saved = directory.as_ref().map(|directory| directory.load(parameters)).transpose()?.flatten();
    parameters.assign(&options.groups);
    parameters.clear_gradients();
    let (progress, task_state) = saved.map(|saved| (saved.progress, saved.task)).unzip();
    let progress = progress.unwrap_or_default();
    if group.size() > 1 {
        group.same("step of the last saved state, which all ranks have to see", &progress.step.to_string())?;
        together::keep_own_states(group, parameters);
    }
    let mut run = Run {
        group,
        task,
        waves,
        options,
        on_event,
        order: Order::new(options.seed, waves.len(), options.waves_per_step),
        keeper: Keeper::new(options.keep, progress.figures, parameters),
        steps: options.steps(waves.len()),
        start: Instant::now(),
        first: (progress.step, progress.tokens, progress.seconds.0),
        reached: progress.events.iter().any(has_gradient),
        progress,
        directory,
        every,
    };
    run.begin(parameters, task_state)?;
    match run.all(parameters) {
        Ok(stop) => run.end(parameters, stop),
        Err(error @ Error::Diverged { .. }) => {
            run.leave_best(parameters)?;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Steps without any gradient after which there is no point in going on. Some may have none: a few experts that no
/// token reached yet.
const PATIENCE: usize = 10;

fn has_gradient(event: &TrainEvent) -> bool {
    matches!(event, TrainEvent::Step { gradient_norm, .. } if *gradient_norm > 0.0)
}

struct Run<'a> {
    group: &'a dyn Group,
    task: &'a mut dyn TrainingTask,
    waves: &'a [Wave],
    options: &'a TrainOptions,
    on_event: OnEvent<'a>,
    order: Order,
    keeper: Keeper,
    steps: usize,
    start: Instant,
    /// Step, tokens and seconds that this process began with.
    first: (usize, u64, f64),
    /// Whether any step has had a gradient.
    reached: bool,
    progress: Progress,
    directory: Option<StateDir>,
    every: Option<usize>,
}

impl Run<'_> {
    /// Brings task and log to where the state is, or evaluates the start.
    fn begin(&mut self, parameters: &mut Parameters, state: Option<super::TaskState>) -> Result<()> {
        if let Some(state) = state {
            self.task.state_load(state, parameters)?;
            self.task.update(parameters)?;
            return self.progress.events.iter().try_for_each(|event| (self.on_event)(event));
        }
        self.task.update(parameters)?;
        if self.options.evaluate_every.is_some() {
            self.evaluate(parameters)?;
        }
        Ok(())
    }

    /// Takes steps until there is a reason to stop.
    fn all(&mut self, parameters: &mut Parameters) -> Result<Stop> {
        loop {
            if let Some(stop) = self.progress.stop {
                return Ok(stop);
            }
            let step = self.progress.step + 1;
            self.step(step, parameters)?;
            let last = step == self.steps;
            if self.options.evaluate_every.is_some_and(|every| step.is_multiple_of(every) || last) {
                self.evaluate(parameters)?;
            }
            let patience = self.options.patience.is_some_and(|patience| self.keeper.figures.since >= patience);
            self.progress.stop = if last { Some(Stop::Finished) } else { patience.then_some(Stop::Patience) };
            if let Some(stop) = self.progress.stop {
                self.tell(TrainEvent::Stopped { step, stop })?;
            }
            let due = self.every.is_some_and(|every| step.is_multiple_of(every));
            // A state that may be about to explode is no good one.
            if (due && self.progress.guard.above == 0) || self.progress.stop.is_some() {
                self.save(parameters)?;
            }
        }
    }

    fn step(&mut self, step: usize, parameters: &mut Parameters) -> Result<()> {
        self.task.before_step(step, parameters)?;
        parameters.assign(&self.options.groups);
        let batch: Vec<&Wave> = self.order.batch(step).iter().map(|index| &self.waves[*index]).collect();
        let mut total = BatchLoss::default();
        let mut run = 0;
        let losses = together::accumulate(self.group, self.task, parameters, &batch)?;
        for (wave, BatchLoss { loss, tokens }) in batch.iter().zip(losses) {
            if !loss.is_finite() {
                return Err(self.diverged(step, format!("the loss of wave {} is {loss}", wave.id)));
            }
            total = BatchLoss { loss: total.loss + loss, tokens: total.tokens + tokens };
            run += wave.tokens() as u64;
        }
        let mean = 1.0 / total.tokens.max(1) as f64;
        self.task.gradients(step, mean, parameters)?;
        let auxiliary = self.task.auxiliary();
        let (loss, gradient_norm) = (total.loss * mean, together::gradient_norm(self.group, parameters)? * mean);
        if !gradient_norm.is_finite() {
            return Err(self.diverged(step, format!("the norm of the gradient is {gradient_norm}")));
        }
        self.reached |= gradient_norm > 0.0;
        if !self.reached && step >= PATIENCE.min(self.steps) {
            let names: Vec<&str> = parameters.iter().map(|(name, _)| name).take(3).collect();
            let parameters = format!("{} parameters ({}, ..)", parameters.iter().count(), names.join(", "));
            return Err(Error::NoGradient { steps: step, parameters });
        }
        if let Some(explosion) = &self.options.explosion
            && let Some(multiple) = self.progress.guard.see(loss, explosion)
        {
            let what = format!("the loss is {multiple:.1} times its running mean, for {} steps now", explosion.steps);
            return Err(self.diverged(step, what));
        }
        let clip = self.options.clip.map_or(1.0, |clip| if gradient_norm > clip { clip / gradient_norm } else { 1.0 });
        let learning_rate = self.options.schedule.rate(step, self.steps);
        let changed = together::about_to_change(self.group, parameters);
        self.options.optimizer.step(parameters, learning_rate, mean * clip)?;
        together::gather_values(self.group, parameters, &changed)?;
        self.task.after_step(step, parameters)?;
        parameters.check_returned()?;
        self.task.update(parameters)?;
        self.progress.step = step;
        self.progress.tokens += total.tokens as u64;
        self.progress.tokens_run += run;
        let (first_step, first_tokens, first_seconds) = self.first;
        let elapsed = self.start.elapsed().max(Duration::from_nanos(1)).as_secs_f64();
        self.progress.seconds = Bits(first_seconds + elapsed);
        self.tell(TrainEvent::Step {
            step,
            steps: self.steps,
            loss,
            gradient_norm,
            learning_rate,
            auxiliary,
            tokens: self.progress.tokens,
            tokens_run: self.progress.tokens_run,
            tokens_per_second: (self.progress.tokens - first_tokens) as f64 / elapsed,
            peak_memory: process_memory().map_or(0, |memory| memory.peak),
            seconds: self.progress.seconds.0,
            eta_seconds: elapsed / (step - first_step) as f64 * (self.steps - step) as f64,
        })
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> Result<()> {
        let step = self.progress.step;
        let (value, best) = self.keeper.evaluate(self.group, self.task, parameters, step, self.directory.as_ref())?;
        self.tell(TrainEvent::Evaluation { step, value, best })
    }

    fn save(&mut self, parameters: &mut Parameters) -> Result<()> {
        let step = self.progress.step;
        if self.directory.is_none() {
            return Ok(());
        }
        if let Some(name) = parameters.not_finite() {
            return Err(self.diverged(step, format!("a value of {name} is not finite")));
        }
        self.keeper.compare(parameters);
        self.progress.figures = self.keeper.figures;
        let event = TrainEvent::Saved { step };
        self.progress.events.push(event.clone());
        let saved = Saved {
            progress: self.progress.clone(),
            position: self.order.position(step + 1),
            best: self.keeper.kept_step(),
            task: self.task.state_save()?,
        };
        if let Some(directory) = &self.directory {
            together::gather_states(self.group, parameters)?;
            directory.save(&saved, parameters)?;
            together::keep_own_states(self.group, parameters);
        }
        (self.on_event)(&event)
    }

    /// Tells an event, and remembers it where a state will need it.
    fn tell(&mut self, event: TrainEvent) -> Result<()> {
        if self.directory.is_some() {
            self.progress.events.push(event.clone());
        }
        (self.on_event)(&event)
    }

    fn diverged(&self, step: usize, what: String) -> Error {
        Error::Diverged { step, what, state: self.directory.as_ref().and_then(StateDir::latest) }
    }

    /// Leaves parameters and task with the values to be kept.
    fn leave_best(&mut self, parameters: &mut Parameters) -> Result<()> {
        parameters.clear_gradients();
        // The first rank has written what the others may read now.
        self.group.check(None)?;
        self.keeper.restore(parameters, self.progress.step, self.directory.as_ref())?;
        self.task.update(parameters)
    }

    fn end(mut self, parameters: &mut Parameters, stop: Stop) -> Result<TrainReport> {
        self.leave_best(parameters)?;
        let figures = self.keeper.figures;
        Ok(TrainReport {
            steps: self.progress.step,
            stop,
            before: figures.before.map(|value| value.0),
            last: figures.last.map(|value| value.0),
            best: self.keeper.best(),
        })
    }
}

#[cfg(test)]
mod tests;
