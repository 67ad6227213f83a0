//! AdamW (Loshchilov and Hutter, arXiv 1711.05101).

use serde::{Deserialize, Serialize};

use super::Parameters;
use crate::error::{Error, Result};

/// `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)`.
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

impl AdamW {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::input(field, value, "a number in [0, 1)"));
            }
        }
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return Err(Error::input("epsilon", self.epsilon, "a finite number above 0"));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::input("weight_decay", self.weight_decay, "a finite number of 0 or more"));
        }
        Ok(())
    }

    /// Step number `step` (from 1), and clears the gradients.
    pub fn step(&self, parameters: &mut Parameters, step: usize, learning_rate: f64) {
        let correct = |beta: f64| 1.0 - beta.powf(step as f64);
        let (correct1, correct2) = (correct(self.beta1), correct(self.beta2));
        for parameter in parameters.all_mut() {
            let moments = parameter.first.iter_mut().zip(&mut parameter.second);
            let values = parameter.values.iter_mut().zip(&mut parameter.gradient);
            for ((value, gradient), (first, second)) in values.zip(moments) {
                let g = f64::from(*gradient);
                let m = self.beta1 * f64::from(*first) + (1.0 - self.beta1) * g;
                let v = self.beta2 * f64::from(*second) + (1.0 - self.beta2) * g * g;
                let w = f64::from(*value);
                let direction = m / correct1 / ((v / correct2).sqrt() + self.epsilon) + self.weight_decay * w;
                (*first, *second, *gradient) = (m as f32, v as f32, 0.0);
                *value = (w - learning_rate * direction) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_by_hand() {
        let adam = AdamW { beta1: 0.5, beta2: 0.75, epsilon: 1e-8, weight_decay: 0.1 };
        let mut parameters = Parameters::new();
        parameters.insert("w", vec![2.0]);
        parameters.get_mut("w").unwrap().gradient[0] = 4.0;
        adam.step(&mut parameters, 1, 0.1);
        // the first step is the sign of the gradient, and decay
        let w = 2.0 - 0.1 * (1.0 + 0.2);
        assert!((parameters.get("w").unwrap().values[0] - w).abs() < 1e-6);
        assert_eq!(parameters.get("w").unwrap().gradient[0], 0.0);
        parameters.get_mut("w").unwrap().gradient[0] = -2.0;
        adam.step(&mut parameters, 2, 0.1);
        let (m, v) = (0.5 * 2.0 - 1.0, 0.75 * 4.0 + 0.25 * 4.0);
        let w = w - 0.1 * (m / 0.75 / f32::sqrt(v / (1.0 - 0.5625)) + 0.1 * w);
        assert!((parameters.get("w").unwrap().values[0] - w).abs() < 1e-6);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let message = |adam: AdamW| adam.validate().unwrap_err().to_string();
        assert!(AdamW::default().validate().is_ok());
        assert!(message(AdamW { beta2: 1.0, ..AdamW::default() }).contains("beta2: found 1"));
        assert!(message(AdamW { epsilon: 0.0, ..AdamW::default() }).contains("epsilon"));
        assert!(message(AdamW { weight_decay: f64::NAN, ..AdamW::default() }).contains("weight_decay"));
    }
}
