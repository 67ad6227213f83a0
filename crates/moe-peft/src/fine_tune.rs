//! Fine-tuning a model: what the training loop runs.

use std::{collections::BTreeMap, sync::Arc};

use moe_checkpoint::group::{Alone, Group};
use moe_core::{
    CrossEntropy, Distillation, Engine, EngineOptions, Model, Objective, TeacherLogits,
    data::Wave,
    trace::{Nobody, Observer, Signals},
    train::{BatchLoss, Parameters, TaskState, TrainingTask},
};

use crate::{AdapterSet, Error, Result};

/// What is minimized.
#[derive(Clone, Debug, Default)]
pub enum Target {
    /// The cross-entropy of the next token, over the tokens that count.
    #[default]
    NextToken,
    /// The divergence from what another model predicted for the same waves.
    Teacher(Arc<TeacherLogits>),
}

/// What a method does besides gradient descent: it may change what is trained from step to step, watch gradients, and
/// change values by rule. Defaults do nothing.
pub trait TrainingHooks: Send {
    /// Before the gradients of step `step` (from 1).
    ///
    /// # Errors
    /// Whatever the hooks find wrong.
    fn before_step(&mut self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        let _ = (step, set, parameters);
        Ok(())
    }

    /// The gradient is complete: `factor` times what the parameters hold is that of the mean loss, not clipped. Hooks
    /// may add that of a loss on the parameters themselves, divided by `factor`, and give its value by name.
    ///
    /// # Errors
    /// Whatever the hooks find wrong.
    fn gradients(&mut self, step: usize, factor: f64, parameters: &mut Parameters) -> Result<BTreeMap<String, f64>> {
        let _ = (step, factor, parameters);
        Ok(BTreeMap::new())
    }

    /// After the optimizer's step.
    ///
    /// # Errors
    /// Whatever the hooks find wrong.
    fn after_step(&mut self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        let _ = (step, set, parameters);
        Ok(())
    }

    /// Whether the ranks of a group may each run other waves of a step: whether the hooks see nothing of a wave but its
    /// gradient, and do the same on every rank. By default it is not known.
    fn is_shareable(&self) -> bool {
        false
    }

    /// What a saved state has to hold of it.
    ///
    /// # Errors
    /// Whatever the hooks find wrong.
    fn state_save(&self) -> Result<TaskState> {
        Ok(TaskState::default())
    }

    /// Takes a saved state back.
    ///
    /// # Errors
    /// Whatever the hooks find wrong.
    fn state_load(&mut self, state: TaskState, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        let _ = (state, set, parameters);
        Ok(())
    }
}

impl TrainingHooks for Box<dyn TrainingHooks> {
    fn before_step(&mut self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        (**self).before_step(step, set, parameters)
    }

    fn gradients(&mut self, step: usize, factor: f64, parameters: &mut Parameters) -> Result<BTreeMap<String, f64>> {
        (**self).gradients(step, factor, parameters)
    }

    fn after_step(&mut self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        (**self).after_step(step, set, parameters)
    }

    fn is_shareable(&self) -> bool {
        (**self).is_shareable()
    }

    fn state_save(&self) -> Result<TaskState> {
        (**self).state_save()
    }

    fn state_load(&mut self, state: TaskState, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        (**self).state_load(state, set, parameters)
    }
}

/// Gradient descent and nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl TrainingHooks for Plain {
    fn is_shareable(&self) -> bool {
        true
    }
}

/// A model whose adapters are trained on waves, for [`moe_core::train::train`].
///
/// Between sweeps values and gradients are with the optimizer; [`with_values`](Self::with_values) lends them for
/// anything else that runs the model.
pub struct FineTune {
    model: Model,
    set: Arc<AdapterSet>,
    hooks: Box<dyn TrainingHooks>,
    target: Target,
    engine: EngineOptions,
    evaluation: Vec<Wave>,
    step: usize,
    /// Sums of the losses beside the objective over the waves of this step.
    auxiliary: BTreeMap<String, f64>,
    waves: usize,
}

struct Trains;

impl Observer for Trains {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }
}

impl FineTune {
    /// Trains the adapters of `set` on `base`, next-token prediction, without evaluation rows.
    ///
    /// # Errors
    /// Those of [`Model::with_adapters`].
    pub fn new(base: &Model, set: Arc<AdapterSet>) -> Result<Self> {
        let model = base.with_adapters(set.clone())?;
        let engine = EngineOptions { loss: true, ..EngineOptions::default() };
        Ok(Self {
            model,
            set,
            hooks: Box::new(Plain),
            target: Target::NextToken,
            engine,
            evaluation: Vec::new(),
            step: 0,
            auxiliary: BTreeMap::new(),
            waves: 0,
        })
    }

    /// Does more than gradient descent.
    pub fn with_hooks(self, hooks: impl TrainingHooks + 'static) -> Self {
        Self { hooks: Box::new(hooks), ..self }
    }

    /// Minimizes something else.
    pub fn with_target(self, target: Target) -> Self {
        Self { target, ..self }
    }

    /// Evaluates the mean loss over `waves`; without any, evaluation gives 0.
    pub fn with_evaluation(self, waves: Vec<Wave>) -> Self {
        Self { evaluation: waves, ..self }
    }

    /// The model with its adapters. It can be run only while values are lent to it, or are
    /// [settled](crate::Bank::settle).
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The adapters.
    pub fn set(&self) -> &Arc<AdapterSet> {
        &self.set
    }

    /// What it does besides gradient descent.
    pub fn hooks(&self) -> &dyn TrainingHooks {
        &*self.hooks
    }

    /// Lends the values to the model while `f` runs it.
    ///
    /// # Errors
    /// What `f` returns, and [`Error::Core`](crate::Error::Core) for values that are lent elsewhere.
    pub fn with_values<R>(&self, parameters: &mut Parameters, f: impl FnOnce(&Model) -> Result<R>) -> Result<R> {
        let bank = self.set.bank();
        bank.lend(parameters, false)?;
        let result = f(&self.model);
        bank.take_back(parameters, false)?;
        result
    }

    fn loss(&self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<BatchLoss> {
        let engine = Engine::new(&self.model, self.engine.clone());
        let mut next = CrossEntropy;
        let mut teacher;
        let objective: &mut dyn Objective = match &self.target {
            Target::NextToken => &mut next,
            Target::Teacher(logits) => {
                teacher = Distillation::new(logits);
                &mut teacher
            }
        };
        let report = engine.run_with(wave, objective, observer)?;
        self.set.bank().check_read().map_err(into_core)?;
        Ok(BatchLoss { loss: report.loss.unwrap_or(0.0), tokens: report.loss_tokens })
    }
}

impl TrainingTask for FineTune {
    fn before_step(&mut self, step: usize, parameters: &mut Parameters) -> moe_core::Result<()> {
        self.step = step;
        self.hooks.before_step(step, &self.set, parameters).map_err(into_core)
    }

    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> moe_core::Result<BatchLoss> {
        let bank = self.set.bank();
        bank.lend(parameters, true).map_err(into_core)?;
        self.set.tell_training(Some(self.step));
        let loss = self.loss(wave, &mut Trains);
        for (name, loss) in self.set.losses() {
            *self.auxiliary.entry(name).or_insert(0.0) += loss;
        }
        self.waves += 1;
        self.set.tell_training(None);
        bank.take_back(parameters, true).map_err(into_core)?;
        loss
    }

    fn gradients(&mut self, step: usize, factor: f64, parameters: &mut Parameters) -> moe_core::Result<()> {
        let waves = std::mem::take(&mut self.waves).max(1) as f64;
        self.auxiliary.values_mut().for_each(|sum| *sum /= waves);
        self.auxiliary.extend(self.hooks.gradients(step, factor, parameters).map_err(into_core)?);
        Ok(())
    }

    fn auxiliary(&mut self) -> BTreeMap<String, f64> {
        std::mem::take(&mut self.auxiliary)
    }

    fn after_step(&mut self, step: usize, parameters: &mut Parameters) -> moe_core::Result<()> {
        self.hooks.after_step(step, &self.set, parameters).map_err(into_core)
    }

    fn update(&mut self, _: &Parameters) -> moe_core::Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> moe_core::Result<f64> {
        self.evaluate_in(&Alone, parameters)
    }

    fn evaluate_in(&mut self, group: &dyn Group, parameters: &mut Parameters) -> moe_core::Result<f64> {
        let bank = self.set.bank();
        bank.lend(parameters, false).map_err(into_core)?;
        let own = self.evaluation.iter().skip(group.rank()).step_by(group.size());
        let own = own.map(|wave| self.loss(wave, &mut Nobody)).collect::<moe_core::Result<Vec<_>>>();
        bank.take_back(parameters, false).map_err(into_core)?;
        let total = shared_losses(group, &own?, self.evaluation.len())?;
        Ok(total.loss / total.tokens.max(1) as f64)
    }

    fn is_shareable(&self) -> bool {
        self.hooks.is_shareable()
    }

    fn state_save(&self) -> moe_core::Result<TaskState> {
        self.hooks.state_save().map_err(into_core)
    }

    fn state_load(&mut self, state: TaskState, parameters: &mut Parameters) -> moe_core::Result<()> {
        self.hooks.state_load(state, &self.set, parameters).map_err(into_core)
    }
}

/// The sum over waves in their order, of which each rank of a group has every Nth.
fn shared_losses(group: &dyn Group, own: &[BatchLoss], waves: usize) -> moe_core::Result<BatchLoss> {
    let message = |of: &BatchLoss| [of.loss.to_le_bytes(), (of.tokens as u64).to_le_bytes()].concat();
    let all = group.share_dealt(own.iter().map(message).collect(), waves)?;
    all.iter().try_fold(BatchLoss::default(), |total, message| {
        let [loss, tokens] = message.as_chunks::<8>().0 else {
            let found = format!("{} bytes", message.len());
            return Err(into_core(Error::input("loss from another rank", found, "16 bytes")));
        };
        let tokens = u64::from_le_bytes(*tokens) as usize;
        Ok(BatchLoss { loss: total.loss + f64::from_le_bytes(*loss), tokens: total.tokens + tokens })
    })
}

/// An error of this crate inside the training loop.
fn into_core(error: crate::Error) -> moe_core::Error {
    match error {
        crate::Error::Core(error) => error,
        other => moe_core::Error::observer(other),
    }
}
