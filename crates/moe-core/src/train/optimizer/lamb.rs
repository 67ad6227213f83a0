//! LAMB (You et al., arXiv 1904.00962).

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{AdamW, not_negative, positive, share};
use crate::{
    error::Result,
    train::{
        Parameter,
        parameters::{PIECE, piecewise},
    },
};

/// Algorithm 2: with Adam's direction r, corrected for its start, and `u = r + decay w`, `w <- w - lr (|w| / |u|) u`.
/// The norms are those of one piece of the parameter ([`Parameter::in_groups`]), summed in f64; the ratio is 1 where
/// either is 0, and at most `max_ratio`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lamb {
    /// Decay of the average of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the average of their squares, in [0, 1).
    pub beta2: f64,
    /// Added to the square root, above 0.
    pub epsilon: f64,
    /// Pull towards zero; 0 or more.
    pub weight_decay: f64,
    /// Largest trust ratio. None if not given.
    pub max_ratio: Option<f64>,
}

impl Default for Lamb {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-6, weight_decay: 0.0, max_ratio: None }
    }
}

impl Lamb {
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)?;
        positive("epsilon", self.epsilon)?;
        not_negative("weight_decay", self.weight_decay)?;
        self.max_ratio.map_or(Ok(()), |ratio| positive("max_ratio", ratio))
    }

    pub(super) fn step(&self, parameter: &mut Parameter, rate: f64, scale: f32) {
        let adam = AdamW { beta1: self.beta1, beta2: self.beta2, epsilon: self.epsilon, weight_decay: 0.0 };
        let (shape, length) = (parameter.shape().to_vec(), parameter.len() / parameter.groups());
        adam.direction(&mut parameter.gradient, &mut parameter.state, &shape, scale);
        let decay = self.weight_decay as f32;
        for (values, update) in parameter.values.chunks_mut(length).zip(parameter.gradient.chunks_mut(length)) {
            if decay > 0.0 {
                let pieces = update.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE));
                pieces.for_each(|(u, w)| u.iter_mut().zip(w).for_each(|(u, w)| *u += decay * w));
            }
            let size = (rate * self.ratio(values, update)) as f32;
            let pieces = values.par_chunks_mut(PIECE).zip(update.par_chunks_mut(PIECE));
            pieces.for_each(|(w, u)| {
                for (w, u) in w.iter_mut().zip(u) {
                    *w -= size * *u;
                    *u = 0.0;
                }
            });
        }
    }

    fn ratio(&self, values: &[f32], update: &[f32]) -> f64 {
        let norm = |x: &[f32]| piecewise(x, |x| x.iter().map(|x| f64::from(*x).powi(2)).sum()).sqrt();
        let (values, update) = (norm(values), norm(update));
        if values == 0.0 || update == 0.0 {
            return 1.0;
        }
        (values / update).min(self.max_ratio.unwrap_or(f64::INFINITY))
    }
}
