//! Optimizers.

mod adamw;
mod burn;
mod lamb;
mod projected;

use serde::{Deserialize, Serialize};

pub use self::burn::{AdaGrad, Adan, Lion, RmsProp, Sgd};
pub use adamw::AdamW;
pub use lamb::Lamb;

use super::parameters::Settings;
use super::{Parameter, Parameters};
use crate::error::{Error, Result};

/// How gradients become steps. In JSON: `{"type": "adamw", "weight_decay": 0.01}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
#[non_exhaustive]
pub enum Optimizer {
    /// AdamW, on the host.
    AdamW(AdamW),
    /// LAMB, on the host.
    Lamb(Lamb),
    /// Gradient descent with momentum.
    Sgd(Sgd),
    /// RMSProp, as Burn has it.
    RmsProp(RmsProp),
    /// AdaGrad, as Burn has it.
    AdaGrad(AdaGrad),
    /// Lion, as Burn has it.
    Lion(Lion),
    /// Adan, as Burn has it.
    Adan(Adan),
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW(AdamW::default())
    }
}

impl Optimizer {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::AdamW(adamw) => adamw.validate(),
            Self::Lamb(lamb) => lamb.validate(),
            Self::Sgd(sgd) => sgd.validate(),
            Self::RmsProp(rms_prop) => rms_prop.validate(),
            Self::AdaGrad(ada_grad) => ada_grad.validate(),
            Self::Lion(lion) => lion.validate(),
            Self::Adan(adan) => adan.validate(),
        }
    }

    /// One step of every active parameter that has a gradient, which is multiplied by `scale` first and cleared after.
    ///
    /// # Errors
    /// [`Error::Input`] for values or gradients that are lent; [`Error::Unsupported`] for a projection with an
    /// optimizer other than AdamW.
    pub fn step(&self, parameters: &mut Parameters, learning_rate: f64, scale: f64) -> Result<()> {
        parameters.check_returned()?;
        for (name, parameter) in parameters.all_mut().filter(|(_, p)| p.touched && p.is_active()) {
            self.step_one(name, parameter, learning_rate, scale as f32)?;
            parameter.touched = false;
            parameter.state.steps += 1;
        }
        Ok(())
    }

    fn step_one(&self, name: &str, parameter: &mut Parameter, rate: f64, scale: f32) -> Result<()> {
        let plain = Settings { learning_rate: 1.0, weight_decay: true, projection: None };
        let Settings { learning_rate, weight_decay, projection } = parameter.settings.unwrap_or(plain);
        let rate = rate * learning_rate;
        let decay = |decay: f64| if weight_decay { decay } else { 0.0 };
        match (self, projection.filter(|_| parameter.shape().len() > 1)) {
            (Self::AdamW(adamw), None) => {
                let adamw = AdamW { weight_decay: decay(adamw.weight_decay), ..*adamw };
                adamw.step(parameter, rate, scale);
            }
            (Self::AdamW(adamw), Some(projection)) => {
                let adamw = AdamW { weight_decay: decay(adamw.weight_decay), ..*adamw };
                projected::step(&adamw, &projection, name, parameter, rate, scale)?;
            }
            (_, Some(_)) => {
                return Err(Error::Unsupported(format!(
                    "a projection of the gradient of {name} with {}",
                    moe_checkpoint::human::variant(self)
                )));
            }
            (Self::Lamb(lamb), None) => {
                Lamb { weight_decay: decay(lamb.weight_decay), ..*lamb }.step(parameter, rate, scale);
            }
            (Self::Sgd(sgd), None) => {
                let sgd = Sgd { weight_decay: decay(sgd.weight_decay), ..*sgd };
                self::burn::step(&sgd.build(), name, parameter, rate, scale)?;
            }
            (Self::RmsProp(rms_prop), None) => {
                let rms_prop = RmsProp { weight_decay: decay(rms_prop.weight_decay), ..*rms_prop };
                self::burn::step(&rms_prop.build(), name, parameter, rate, scale)?;
            }
            (Self::AdaGrad(ada_grad), None) => {
                let ada_grad = AdaGrad { weight_decay: decay(ada_grad.weight_decay), ..*ada_grad };
                self::burn::step(&ada_grad.build(), name, parameter, rate, scale)?;
            }
            (Self::Lion(lion), None) => {
                let lion = Lion { weight_decay: decay(lion.weight_decay), ..*lion };
                self::burn::step(&lion.build(), name, parameter, rate, scale)?;
            }
            (Self::Adan(adan), None) => {
                let adan = Adan { weight_decay: decay(adan.weight_decay), ..*adan };
                self::burn::step(&adan.build(), name, parameter, rate, scale)?;
            }
        }
        Ok(())
    }
}

/// Checks that a field is in [0, 1).
fn share(field: &str, value: f64) -> Result<()> {
    match (0.0..1.0).contains(&value) {
        true => Ok(()),
        false => Err(Error::input(field, value, "a number in [0, 1)")),
    }
}

/// Checks that a field is finite and above 0.
fn positive(field: &str, value: f64) -> Result<()> {
    match value > 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(Error::input(field, value, "a finite number above 0")),
    }
}

/// Checks that a field is finite and 0 or more.
fn not_negative(field: &str, value: f64) -> Result<()> {
    match value >= 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(Error::input(field, value, "a finite number of 0 or more")),
    }
}

#[cfg(test)]
mod tests;
