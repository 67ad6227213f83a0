//! How to train.

use serde::{Deserialize, Serialize};

use super::{Optimizer, ParameterGroup, Schedule};
use crate::error::{Error, Result};

/// Which parameters training leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Those with the lowest figure in any evaluation, the start included; the last ones without evaluations. Costs a
    /// copy of the values, in memory or, when the state is saved, in a file.
    #[default]
    Best,
    /// Those after the last step.
    Last,
}

/// When a loss counts as exploding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Explosion {
    /// Multiple of the running mean that is too much, above 1.
    pub factor: f64,
    /// Steps in a row with too large a loss that stop training.
    pub steps: usize,
    /// Steps that the running mean looks back, roughly; nothing is judged before as many were taken.
    pub window: usize,
}

impl Default for Explosion {
    fn default() -> Self {
        Self { factor: 3.0, steps: 5, window: 20 }
    }
}

/// How to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// Passes over the waves.
    pub epochs: usize,
    /// Most steps, which the schedule then ends with. None if not given.
    pub max_steps: Option<usize>,
    /// Waves per step: their gradients are added and divided by their predicted tokens.
    pub waves_per_step: usize,
    /// Learning rate.
    pub schedule: Schedule,
    /// What turns gradients into steps.
    pub optimizer: Optimizer,
    /// Parameters that are trained in another way than the rest.
    pub groups: Vec<ParameterGroup>,
    /// Largest norm of a step's gradient; longer ones are scaled down. None if not given.
    pub clip: Option<f64>,
    /// Steps between evaluations; the start and the last step are evaluated, too. Without it, nothing is.
    pub evaluate_every: Option<usize>,
    /// Which parameters are left in the end.
    pub keep: Keep,
    /// Evaluations in a row without a new best one that stop training. None if not given.
    pub patience: Option<usize>,
    /// When the loss explodes. Not watched if not given. A loss or gradient that is not finite always stops training.
    pub explosion: Option<Explosion>,
    /// Seed of the order of the waves in each epoch.
    pub seed: u64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            epochs: 3,
            max_steps: None,
            waves_per_step: 1,
            schedule: Schedule::default(),
            optimizer: Optimizer::default(),
            groups: Vec::new(),
            clip: Some(1.0),
            evaluate_every: Some(20),
            keep: Keep::Best,
            patience: None,
            explosion: None,
            seed: 0,
        }
    }
}

impl TrainOptions {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        self.optimizer.validate()?;
        self.groups.iter().try_for_each(ParameterGroup::validate)?;
        let explosion = self.explosion.unwrap_or_default();
        let counts = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("waves_per_step", self.waves_per_step),
            ("evaluate_every", self.evaluate_every.unwrap_or(1)),
            ("patience", self.patience.unwrap_or(1)),
            ("steps of explosion", explosion.steps),
            ("window of explosion", explosion.window),
        ];
        if let Some((field, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::input(field, 0, "at least 1"));
        }
        if !(explosion.factor > 1.0 && explosion.factor.is_finite()) {
            return Err(Error::input("factor of explosion", explosion.factor, "a finite number above 1"));
        }
        if self.patience.is_some() && self.evaluate_every.is_none() {
            return Err(Error::input("patience", "one without evaluations", "evaluate_every beside it"));
        }
        let projected = self.groups.iter().find(|group| group.projection.is_some());
        if let (Some(group), false) = (projected, matches!(self.optimizer, Optimizer::AdamW(_))) {
            return Err(Error::input(format!("projection of group {}", group.pattern), "one", "none, or adamw"));
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
        let steps = self.epochs * waves.div_ceil(self.waves_per_step.max(1));
        steps.min(self.max_steps.unwrap_or(usize::MAX))
    }

    /// Checks that every group has one of the parameters of these names, unless it may come later.
    ///
    /// # Errors
    /// [`Error::Input`] names the pattern that matches none.
    pub fn check_groups(&self, names: &[&str]) -> Result<()> {
        let missing = |group: &&ParameterGroup| !group.later && !names.iter().any(|name| group.matches(name));
        match self.groups.iter().find(missing) {
            Some(group) => Err(Error::input("pattern of a parameter group", &group.pattern, "one that matches a name")),
            None => Ok(()),
        }
    }
}
