//! The learning rate over time.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// On a straight line.
    Linear,
    /// On half a cosine wave.
    #[default]
    Cosine,
}

/// Learning rate: rises on a straight line during the warm-up, then falls to `final_share` of its peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Largest rate, above 0.
    pub peak: f64,
    /// Share of the steps that the rate rises in, in [0, 1].
    pub warmup: f64,
    /// How it falls.
    pub decay: Decay,
    /// Rate of the last step, as a share of the peak, in [0, 1].
    pub final_share: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { peak: 1e-3, warmup: 0.05, decay: Decay::Cosine, final_share: 0.1 }
    }
}

impl Schedule {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.peak > 0.0 && self.peak.is_finite()) {
            return Err(Error::input("learning rate", self.peak, "a finite number above 0"));
        }
        for (field, value) in [("warmup", self.warmup), ("final_share", self.final_share)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::input(field, value, "a number in [0, 1]"));
            }
        }
        Ok(())
    }

    /// Rate of step `step` (from 1) of `steps`.
    pub fn rate(&self, step: usize, steps: usize) -> f64 {
        let warmup = (self.warmup * steps as f64).floor() as usize;
        if step <= warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        // 0 at the end of the warm-up, 1 at the last step
        let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        let left = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * (self.final_share + (1.0 - self.final_share) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let schedule = |decay| Schedule { peak: 2.0, warmup: 0.2, decay, final_share: 0.25 };
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            assert_eq!(schedule(decay).rate(1, 10), 1.0);
            assert_eq!(schedule(decay).rate(2, 10), 2.0);
        }
        assert_eq!(schedule(Decay::Constant).rate(10, 10), 2.0);
        assert_eq!(schedule(Decay::Linear).rate(6, 10), 2.0 * (0.25 + 0.75 * 0.5));
        assert!((schedule(Decay::Cosine).rate(6, 10) - 2.0 * (0.25 + 0.75 * 0.5)).abs() < 1e-12);
        assert!((schedule(Decay::Cosine).rate(10, 10) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule { warmup: 0.0, ..schedule(Decay::Linear) }.rate(1, 1), 0.5);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let message = |schedule: Schedule| schedule.validate().unwrap_err().to_string();
        assert!(message(Schedule { peak: 0.0, ..Schedule::default() }).contains("learning rate"));
        assert!(message(Schedule { warmup: 1.5, ..Schedule::default() }).contains("warmup: found 1.5"));
    }
}
