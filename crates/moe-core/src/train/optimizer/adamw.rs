//! AdamW (Loshchilov and Hutter, arXiv 1711.05101).

use multiversion::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{not_negative, positive, share};
use crate::{
    error::Result,
    train::{OptimizerState, Parameter, StateArray, parameters::PIECE},
};

/// `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) +
/// decay w)`, in f32 and in the order of PyTorch's operations; t counts the steps of the parameter. 8 bytes of memory
/// per value besides value and gradient.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the average of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the average of their squares, in [0, 1).
    pub beta2: f64,
    /// Added to the square root, above 0.
    pub epsilon: f64,
    /// Pull towards zero, not part of the gradient; 0 or more.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// Names of the moments in an [`OptimizerState`].
pub(super) const MOMENTS: [&str; 2] = ["first", "second"];

/// Numbers of one step.
#[derive(Clone, Copy)]
pub(super) struct Constants {
    scale: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    /// `1 - lr decay`.
    keep: f32,
    /// Factor of `m / (sqrt(v) / root2 + eps)`.
    size: f32,
    root2: f32,
    epsilon: f32,
}

impl AdamW {
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)?;
        positive("epsilon", self.epsilon)?;
        not_negative("weight_decay", self.weight_decay)
    }

    /// For step number `step` (from 1).
    pub(super) fn constants(&self, step: u64, rate: f64, scale: f32) -> Constants {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Constants {
            scale,
            beta2: self.beta2 as f32,
            rest1: (1.0 - self.beta1) as f32,
            rest2: (1.0 - self.beta2) as f32,
            keep: (1.0 - rate * self.weight_decay) as f32,
            size: (rate / correction(self.beta1)) as f32,
            root2: correction(self.beta2).sqrt() as f32,
            epsilon: self.epsilon as f32,
        }
    }

    pub(super) fn step(&self, parameter: &mut Parameter, rate: f64, scale: f32) {
        let constants = self.constants(parameter.state.steps + 1, rate, scale);
        let shape = parameter.shape().to_vec();
        let [first, second] = moments(&mut parameter.state, &shape);
        let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
        let values = parameter.values.par_chunks_mut(PIECE).zip(parameter.gradient.par_chunks_mut(PIECE));
        values.zip(moments).for_each(|((values, gradient), (first, second))| {
            step_piece(constants, values, gradient, first, second);
        });
    }

    /// Turns a gradient into `m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`, with moments of `shape`.
    pub(super) fn direction(&self, gradient: &mut [f32], state: &mut OptimizerState, shape: &[usize], scale: f32) {
        let constants = self.constants(state.steps + 1, 1.0, scale);
        let [first, second] = moments(state, shape);
        let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
        gradient.par_chunks_mut(PIECE).zip(moments).for_each(|(gradient, (first, second))| {
            direction_piece(constants, gradient, first, second);
        });
    }
}

/// The moments, zeros at first and where their shape has changed.
pub(super) fn moments<'a>(state: &'a mut OptimizerState, shape: &[usize]) -> [&'a mut [f32]; 2] {
    for name in MOMENTS {
        if state.arrays.get(name).is_none_or(|array| array.shape != shape) {
            let values = vec![0.0; shape.iter().product()];
            state.arrays.insert(name.into(), StateArray { shape: shape.to_vec(), values });
        }
    }
    let mut arrays = state.arrays.iter_mut().filter(|(name, _)| MOMENTS.contains(&name.as_str()));
    // in the order of their names
    let mut next = || arrays.next().map(|(_, array)| array.values.as_mut_slice()).unwrap_or_default();
    [next(), next()]
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn step_piece(c: Constants, values: &mut [f32], gradient: &mut [f32], first: &mut [f32], second: &mut [f32]) {
    for (((w, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
        let scaled = *g * c.scale;
        *g = 0.0;
        *m += c.rest1 * (scaled - *m);
        *v = *v * c.beta2 + c.rest2 * scaled * scaled;
        *w = *w * c.keep - c.size * (*m / (v.sqrt() / c.root2 + c.epsilon));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn direction_piece(c: Constants, gradient: &mut [f32], first: &mut [f32], second: &mut [f32]) {
    for ((g, m), v) in gradient.iter_mut().zip(first).zip(second) {
        let scaled = *g * c.scale;
        *m += c.rest1 * (scaled - *m);
        *v = *v * c.beta2 + c.rest2 * scaled * scaled;
        *g = c.size * (*m / (v.sqrt() / c.root2 + c.epsilon));
    }
}
