//! The learning rate over time.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// Not at all.
    Constant,
    /// On a straight line.
    Linear,
    /// On half a cosine wave.
    #[default]
    Cosine,
    /// On half a cosine wave again and again (SGDR, arXiv 1608.03983): the first for `first` steps, each later one
    /// `factor` times as long. A wave's first step has the peak.
    CosineRestarts {
        /// Steps of the first wave, at least 1.
        first: usize,
        /// Growth of the waves, at least 1.
        factor: usize,
    },
}

/// Learning rate: rises on a straight line during the warm-up, then falls to `final_share` of its peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Largest rate, above 0.
    pub peak: f64,
    /// Share of the steps that the rate rises in, in [0, 1].
    pub warmup: f64,
    /// Steps that the rate rises in, instead of a share of them. None if not given.
    pub warmup_steps: Option<usize>,
    /// How it falls.
    pub decay: Decay,
    /// Rate of the last step, as a share of the peak, in [0, 1].
    pub final_share: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { peak: 1e-3, warmup: 0.05, warmup_steps: None, decay: Decay::Cosine, final_share: 0.1 }
    }
}

impl Schedule {
    /// The same rate at every step.
    pub fn constant(rate: f64) -> Self {
        Self { peak: rate, warmup: 0.0, decay: Decay::Constant, ..Self::default() }
    }

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
        if let Decay::CosineRestarts { first, factor } = self.decay {
            for (field, value) in [("first of cosine_restarts", first), ("factor of cosine_restarts", factor)] {
                if value == 0 {
                    return Err(Error::input(field, value, "at least 1"));
                }
            }
        }
        Ok(())
    }

    /// Rate of step `step` (from 1) of `steps`.
    pub fn rate(&self, step: usize, steps: usize) -> f64 {
        let share = (self.warmup * steps as f64).floor() as usize;
        let warmup = self.warmup_steps.unwrap_or(share);
        if step <= warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        // 0 at the end of the warm-up, 1 at the last step
        let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        let cosine = |progress: f64| 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let left = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => cosine(progress),
            Decay::CosineRestarts { first, factor } => {
                let (mut position, mut length) = (step - warmup - 1, first.max(1));
                while position >= length {
                    position -= length;
                    length = length.saturating_mul(factor.max(1));
                }
                cosine(position as f64 / length as f64)
            }
        };
        self.peak * (self.final_share + (1.0 - self.final_share) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let schedule = |decay| Schedule { peak: 2.0, warmup: 0.2, warmup_steps: None, decay, final_share: 0.25 };
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            assert_eq!(schedule(decay).rate(1, 10), 1.0);
            assert_eq!(schedule(decay).rate(2, 10), 2.0);
            let steps = Schedule { warmup_steps: Some(4), ..schedule(decay) };
            assert_eq!((steps.rate(1, 10), steps.rate(4, 10)), (0.5, 2.0));
        }
        assert_eq!(schedule(Decay::Constant).rate(10, 10), 2.0);
        assert_eq!(Schedule::constant(0.5).rate(1, 10), 0.5);
        assert_eq!(schedule(Decay::Linear).rate(6, 10), 2.0 * (0.25 + 0.75 * 0.5));
        assert_eq!(
            Schedule { warmup_steps: Some(6), ..schedule(Decay::Linear) }.rate(8, 10),
            2.0 * (0.25 + 0.75 * 0.5)
        );
        assert!((schedule(Decay::Cosine).rate(6, 10) - 2.0 * (0.25 + 0.75 * 0.5)).abs() < 1e-12);
        assert!((schedule(Decay::Cosine).rate(10, 10) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule { warmup: 0.0, ..schedule(Decay::Linear) }.rate(1, 1), 0.5);
        // a warm-up that outlasts the steps
        assert_eq!(Schedule { warmup_steps: Some(20), ..schedule(Decay::Linear) }.rate(10, 10), 1.0);
    }

    /// `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2, T_mult=2)` with a rate of 1: 1, 0.5, 1,
    /// 0.8536, 0.5, 0.1464, 1, ...
    #[test]
    fn waves_restart_and_grow() {
        let decay = Decay::CosineRestarts { first: 2, factor: 2 };
        let schedule = Schedule { peak: 1.0, warmup: 0.0, warmup_steps: None, decay, final_share: 0.0 };
        let expected = [1.0, 0.5, 1.0, 0.853_553_39, 0.5, 0.146_446_61, 1.0, 0.961_939_77];
        for (step, expected) in expected.iter().enumerate() {
            assert!((schedule.rate(step + 1, 8) - expected).abs() < 1e-8, "step {step}");
        }
        let json = serde_json::to_string(&schedule).unwrap();
        assert!(json.contains(r#""decay":{"cosine_restarts":{"first":2,"factor":2}}"#), "{json}");
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let message = |schedule: Schedule| schedule.validate().unwrap_err().to_string();
        assert!(message(Schedule { peak: 0.0, ..Schedule::default() }).contains("learning rate"));
        assert!(message(Schedule { warmup: 1.5, ..Schedule::default() }).contains("warmup: found 1.5"));
        let decay = Decay::CosineRestarts { first: 2, factor: 0 };
        assert!(message(Schedule { decay, ..Schedule::default() }).contains("factor of cosine_restarts"));
    }
}
