//! One value for all MoE layers, or one for each.

use moe_checkpoint::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A value for all MoE layers, or a list with one for each MoE layer in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLayer<T> {
    /// The same for all.
    All(T),
    /// One for each MoE layer, in order.
    Each(Vec<T>),
}

impl<T: Copy> PerLayer<T> {
    /// The MoE layers of a model, each with its number of experts and its value.
    ///
    /// # Errors
    /// [`Error::Input`] names `field` for another number of values than the model has MoE layers, and for a model
    /// without any.
    pub fn of(&self, config: &ModelConfig, field: &str) -> Result<Vec<(usize, usize, T)>> {
        let layers = moe_layers(config)?;
        match self {
            Self::All(value) => Ok(layers.into_iter().map(|(layer, experts)| (layer, experts, *value)).collect()),
            Self::Each(values) if values.len() == layers.len() => {
                Ok(layers.into_iter().zip(values).map(|((layer, experts), value)| (layer, experts, *value)).collect())
            }
            Self::Each(values) => {
                let expected = format!("one for each of the {} MoE layers, or a single one", layers.len());
                Err(Error::input(field, format!("{} values", values.len()), expected))
            }
        }
    }
}

/// The MoE layers of a model with their numbers of experts.
///
/// # Errors
/// [`Error::Input`] for a model without any.
pub(crate) fn moe_layers(config: &ModelConfig) -> Result<Vec<(usize, usize)>> {
    let layers = (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?.num_experts())));
    let layers: Vec<(usize, usize)> = layers.collect();
    match layers.is_empty() {
        true => Err(Error::input("layers with routed experts", 0, "at least one, for a rule that routes tokens")),
        false => Ok(layers),
    }
}
