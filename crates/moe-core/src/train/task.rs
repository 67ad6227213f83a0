//! What the loop asks of what it trains.

use std::collections::BTreeMap;

use moe_checkpoint::group::Group;
use serde::{Deserialize, Serialize};

use super::{Parameters, StateArray};
use crate::{
    data::Wave,
    error::{Error, Result},
};

/// What is trained on waves.
///
/// The parameters have the only copy of the weights on the host that is needed: a task may take values or gradients out
/// for a sweep ([`Parameters::lend_values`], [`Parameters::lend_gradient`]) and gives them back before it returns.
pub trait TrainingTask {
    /// Before the gradients of step `step` (from 1) are computed: the place to decide which parameters are active, to
    /// add or remove some, or to drop their moments. No [`update`](Self::update) follows.
    ///
    /// # Errors
    /// Whatever the task finds wrong.
    fn before_step(&mut self, step: usize, parameters: &mut Parameters) -> Result<()> {
        let _ = (step, parameters);
        Ok(())
    }

    /// Adds the gradient of the *sum* of the losses over a wave's predicted tokens to the active parameters.
    ///
    /// # Errors
    /// Whatever stops the model.
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss>;

    /// The gradient of step `step` is complete: `factor` times what the parameters hold is the gradient of the mean
    /// loss, not clipped yet. The place to add that of a loss on the parameters themselves, divided by `factor`.
    ///
    /// # Errors
    /// Whatever the task finds wrong.
    fn gradients(&mut self, step: usize, factor: f64, parameters: &mut Parameters) -> Result<()> {
        let _ = (step, factor, parameters);
        Ok(())
    }

    /// The losses that stood beside the mean loss since the last call, coefficients included, as means per wave, by
    /// name. Asked once per step, after [`gradients`](Self::gradients); none by default.
    fn auxiliary(&mut self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }

    /// After the optimizer's step, before [`update`](Self::update): for changes by rule instead of by gradient.
    ///
    /// # Errors
    /// Whatever the task finds wrong.
    fn after_step(&mut self, step: usize, parameters: &mut Parameters) -> Result<()> {
        let _ = (step, parameters);
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
    fn evaluate(&mut self, parameters: &mut Parameters) -> Result<f64>;

    /// The same, where the ranks of a group share the waves that it is measured on: the same bits on each of them as
    /// [`evaluate`](Self::evaluate) gives. By default every rank measures all.
    ///
    /// # Errors
    /// Whatever stops the model or the group.
    fn evaluate_in(&mut self, group: &dyn Group, parameters: &mut Parameters) -> Result<f64> {
        let _ = group;
        self.evaluate(parameters)
    }

    /// Whether the ranks of a group may each run other waves of a step: whether nothing but the gradients and the loss
    /// is left of a wave. By default it is not known, and a group of several is refused.
    fn is_shareable(&self) -> bool {
        false
    }

    /// What of the task itself goes into a saved state, so that a resumed run goes on as if nothing had happened:
    /// counters, generators of random numbers, what is selected. Parameters, their activity and their moments are saved
    /// by the loop.
    ///
    /// # Errors
    /// Whatever the task finds wrong.
    fn state_save(&self) -> Result<TaskState> {
        Ok(TaskState::default())
    }

    /// Takes a saved state back; `parameters` are those of the state already. [`update`](Self::update) follows.
    ///
    /// # Errors
    /// Whatever the task finds wrong; by default, a state that is not empty.
    fn state_load(&mut self, state: TaskState, parameters: &mut Parameters) -> Result<()> {
        let _ = parameters;
        match state == TaskState::default() {
            true => Ok(()),
            false => Err(Error::input("state of the task", "a state", "none: this task keeps none")),
        }
    }
}

/// State of a task, saved with that of the training.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskState {
    /// Anything small. Numbers that have to come back bit by bit are integers or belong into `arrays`.
    pub json: serde_json::Value,
    /// Anything large, by name.
    pub arrays: BTreeMap<String, StateArray>,
}

/// Loss of some waves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchLoss {
    /// Sum over the predicted tokens.
    pub loss: f64,
    /// Predicted tokens.
    pub tokens: usize,
}
