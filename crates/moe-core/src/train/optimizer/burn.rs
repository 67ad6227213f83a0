//! Burn's optimizers, stepping plain tensors on the host.

use burn::tensor::{Device, TensorData};
use burn_optim::decay::WeightDecayConfig;
use burn_optim::momentum::MomentumConfig;
use burn_optim::{RecordState, StateSink, StateSource};
use serde::{Deserialize, Serialize};

use super::{not_negative, positive, share};
use crate::error::{Error, Result};
use crate::host;
use crate::train::{Parameter, StateArray};

/// Stochastic gradient descent ([`burn_optim::Sgd`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sgd {
    /// Decay of the velocity, in [0, 1); 0 for none.
    pub momentum: f64,
    /// Share of the gradient that does not enter the velocity, in [0, 1).
    pub dampening: f64,
    /// Nesterov's look-ahead.
    pub nesterov: bool,
    /// Pull towards zero, part of the gradient; 0 or more.
    pub weight_decay: f64,
}

impl Sgd {
    pub(super) fn validate(&self) -> Result<()> {
        share("momentum", self.momentum)?;
        share("dampening", self.dampening)?;
        not_negative("weight_decay", self.weight_decay)
    }

    pub(super) fn build(&self) -> burn_optim::Sgd {
        let Self { momentum, dampening, nesterov, .. } = *self;
        let config = burn_optim::SgdConfig::new().with_weight_decay(l2(self.weight_decay));
        config.with_momentum((momentum > 0.0).then_some(MomentumConfig { momentum, dampening, nesterov })).build()
    }
}

/// RMSProp ([`burn_optim::RmsProp`]).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RmsProp {
    /// Decay of the average of squared gradients, in [0, 1).
    pub alpha: f64,
    /// Decay of the velocity, in [0, 1).
    pub momentum: f64,
    /// Added to the square root, above 0.
    pub epsilon: f64,
    /// Whether the variance is taken instead of the mean square.
    pub centered: bool,
    /// Pull towards zero, part of the gradient; 0 or more.
    pub weight_decay: f64,
}

impl Default for RmsProp {
    fn default() -> Self {
        Self { alpha: 0.99, momentum: 0.0, epsilon: 1e-8, centered: false, weight_decay: 0.0 }
    }
}

impl RmsProp {
    pub(super) fn validate(&self) -> Result<()> {
        share("alpha", self.alpha)?;
        share("momentum", self.momentum)?;
        positive("epsilon", self.epsilon)?;
        not_negative("weight_decay", self.weight_decay)
    }

    pub(super) fn build(&self) -> burn_optim::RmsProp {
        let config = burn_optim::RmsPropConfig::new().with_alpha(self.alpha as f32).with_momentum(self.momentum as f32);
        let config = config.with_epsilon(self.epsilon as f32).with_centered(self.centered);
        config.with_weight_decay(l2(self.weight_decay)).build()
    }
}

/// AdaGrad ([`burn_optim::AdaGrad`]).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaGrad {
    /// The rate is divided by 1 plus this for every step taken; 0 or more.
    pub rate_decay: f64,
    /// Added to the square root, above 0.
    pub epsilon: f64,
    /// Pull towards zero, part of the gradient; 0 or more.
    pub weight_decay: f64,
}

impl Default for AdaGrad {
    fn default() -> Self {
        Self { rate_decay: 0.0, epsilon: 1e-10, weight_decay: 0.0 }
    }
}

impl AdaGrad {
    pub(super) fn validate(&self) -> Result<()> {
        not_negative("rate_decay", self.rate_decay)?;
        positive("epsilon", self.epsilon)?;
        not_negative("weight_decay", self.weight_decay)
    }

    pub(super) fn build(&self) -> burn_optim::AdaGrad {
        let config = burn_optim::AdaGradConfig::new().with_lr_decay(self.rate_decay);
        config.with_epsilon(self.epsilon as f32).with_weight_decay(l2(self.weight_decay)).build()
    }
}

/// Lion, arXiv 2302.06675 ([`burn_optim::Lion`]).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lion {
    /// Weight of the momentum in the direction, in [0, 1).
    pub beta1: f64,
    /// Decay of the momentum, in [0, 1).
    pub beta2: f64,
    /// Pull towards zero, not part of the gradient; 0 or more.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

impl Lion {
    pub(super) fn validate(&self) -> Result<()> {
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)?;
        not_negative("weight_decay", self.weight_decay)
    }

    pub(super) fn build(&self) -> burn_optim::Lion {
        let config = burn_optim::LionConfig::new().with_beta_1(self.beta1 as f32).with_beta_2(self.beta2 as f32);
        config.with_weight_decay(self.weight_decay as f32).build()
    }
}

/// Adan, arXiv 2208.06677 ([`burn_optim::Adan`]).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adan {
    /// Decay of the average of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the average of their differences, in [0, 1).
    pub beta2: f64,
    /// Decay of the average of squares, in [0, 1).
    pub beta3: f64,
    /// Added to the square root, above 0.
    pub epsilon: f64,
    /// Pull towards zero, not part of the gradient; 0 or more.
    pub weight_decay: f64,
}

impl Default for Adan {
    fn default() -> Self {
        Self { beta1: 0.98, beta2: 0.92, beta3: 0.99, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

impl Adan {
    pub(super) fn validate(&self) -> Result<()> {
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)?;
        share("beta3", self.beta3)?;
        positive("epsilon", self.epsilon)?;
        not_negative("weight_decay", self.weight_decay)
    }

    pub(super) fn build(&self) -> burn_optim::Adan {
        let config = burn_optim::AdanConfig::new().with_beta_1(self.beta1 as f32).with_beta_2(self.beta2 as f32);
        let config = config.with_beta_3(self.beta3 as f32).with_epsilon(self.epsilon as f32);
        config.with_weight_decay(self.weight_decay as f32).build()
    }
}

fn l2(weight_decay: f64) -> Option<WeightDecayConfig> {
    (weight_decay > 0.0).then_some(WeightDecayConfig { penalty: weight_decay as f32 })
}

/// A step of one of Burn's optimizers, on the values as one vector. Its state becomes named arrays and counters, so
/// that it is saved like ours.
pub(super) fn step<O: burn_optim::Optimizer>(
    optimizer: &O,
    name: &str,
    parameter: &mut Parameter,
    rate: f64,
    scale: f32,
) -> Result<()> {
    let device = Device::default();
    let length = [parameter.len()];
    let mut gradient = std::mem::take(&mut parameter.gradient);
    gradient.iter_mut().for_each(|g| *g *= scale);
    let values = std::mem::take(&mut parameter.values);
    let state = std::mem::take(&mut parameter.state.arrays);
    let scalars = std::mem::take(&mut parameter.state.scalars);
    let state = (parameter.state.steps > 0).then(|| {
        let mut source = StateSource::new(scalars.into_iter().map(|(name, value)| (name, value.into())).collect());
        for (name, StateArray { shape, values }) in state {
            source.insert_tensor(name, TensorData::new(values, shape));
        }
        O::State::<1>::state_unflatten(PREFIX, &mut source, &device)
    });
    // None inside means that something of it is missing.
    let missing = || Error::input(format!("optimizer state of {name}"), "another optimizer's", "that of this one");
    let state = state.map(|state| state.ok_or_else(missing)).transpose()?;
    let tensor = host::from_vec(values, length, &device);
    let (tensor, state) = optimizer.step::<1>(rate, tensor, host::from_vec(gradient, length, &device), state);
    parameter.values = host::into_vec::<1>(tensor);
    let mut sink = StateSink::default();
    if let Some(state) = state {
        state.state_flatten(PREFIX, &mut sink);
    }
    for (key, data) in sink.tensors {
        let shape = data.shape().to_vec();
        let values = data
            .try_into_vec::<f32>()
            .map_err(|error| Error::Unsupported(format!("{key}: {}", moe_checkpoint::human::variant(&error))))?;
        parameter.state.arrays.insert(key, StateArray { shape, values });
    }
    for (key, value) in sink.scalars {
        let value = value.try_into().map_err(|error| Error::Unsupported(format!("{key}: {error}")))?;
        parameter.state.scalars.insert(key, value);
    }
    Ok(())
}

/// What names of a flattened state begin with.
const PREFIX: &str = "burn";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_out_of_range_are_named() {
        let error = |result: Result<()>| result.unwrap_err().to_string();
        assert!(error(Sgd { momentum: 1.0, ..Sgd::default() }.validate()).contains("momentum: found 1"));
        assert!(error(RmsProp { epsilon: 0.0, ..RmsProp::default() }.validate()).contains("epsilon"));
        assert!(error(AdaGrad { rate_decay: -1.0, ..AdaGrad::default() }.validate()).contains("rate_decay"));
        assert!(error(Lion { beta2: 2.0, ..Lion::default() }.validate()).contains("beta2"));
        assert!(error(Adan { beta3: -0.5, ..Adan::default() }.validate()).contains("beta3"));
    }
}
