//! Vectors added to the logits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::{
    RunTimeRouting,
    selection_bias::{check_values, lists},
};
use crate::{
    Model,
    error::Result,
    overlay::{LogitTransform, RouterTokens, RuleGradients},
};

/// Adds a constant vector to the logits of all tokens of a layer, so that it changes both choice and weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shift {
    /// One list `[E]` for each MoE layer, in order.
    pub delta: Vec<Vec<f32>>,
}

impl Shift {
    /// The changes of a model's logits.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for another number of layers or of experts, and for numbers that are not
    /// finite.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        let mut routing = RunTimeRouting::default();
        for (layer, _, delta) in lists(model.config(), &self.delta, "delta")? {
            routing.logits.insert(layer, Arc::new(LogitShift::new(delta.to_vec())));
        }
        Ok(routing)
    }
}

/// A vector `[E]` on the logits of a layer that may change between sweeps, with its gradient.
#[derive(Debug)]
pub struct LogitShift {
    delta: RwLock<Vec<f32>>,
    gradient: Mutex<Vec<f32>>,
}

impl LogitShift {
    /// A shift by `delta [E]`.
    pub fn new(delta: Vec<f32>) -> Self {
        Self { gradient: Mutex::new(vec![0.0; delta.len()]), delta: RwLock::new(delta) }
    }

    /// The vector.
    pub fn delta(&self) -> Vec<f32> {
        self.delta.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes another one from the next sweep on.
    pub fn set(&self, delta: Vec<f32>) {
        *self.delta.write().unwrap_or_else(PoisonError::into_inner) = delta;
    }

    /// The gradient of what sweeps that ask for parameters have added up since the last call `[E]`.
    pub fn take_gradient(&self) -> Vec<f32> {
        let mut gradient = self.gradient();
        let length = gradient.len();
        std::mem::replace(&mut *gradient, vec![0.0; length])
    }

    fn gradient(&self) -> MutexGuard<'_, Vec<f32>> {
        self.gradient.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogitTransform for LogitShift {
    fn forward(&self, tokens: &RouterTokens<'_>) -> Result<Vec<f32>> {
        let delta = self.delta.read().unwrap_or_else(PoisonError::into_inner);
        check_values(&delta, tokens.layer, tokens.experts, "shift of the logits")?;
        let rows = tokens.logits.chunks_exact(tokens.experts);
        Ok(rows.flat_map(|row| row.iter().zip(delta.iter()).map(|(z, d)| z + d)).collect())
    }

    fn backward(&self, tokens: &RouterTokens<'_>, d_logits: &[f32], parameters: bool) -> Result<RuleGradients> {
        if parameters {
            let mut gradient = self.gradient();
            for row in d_logits.chunks_exact(tokens.experts) {
                gradient.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
            }
        }
        Ok(d_logits.to_vec().into())
    }
}
