//! A bias on the choice of experts.

use moe_checkpoint::ModelConfig;
use serde::{Deserialize, Serialize};

use super::{RunTimeRouting, members::Members, per_layer::PerLayer};
use crate::{
    Model,
    error::{Error, Result},
    overlay::RouterTokens,
    router::{Routed, Router},
};

/// Adds to the scores of experts for the choice, not for the weights: what loss-free balancing (arXiv 2408.15664)
/// learns, or an operator wants for placement. Beside a bias that the model has, it is added to that. On a softmax
/// model it shifts membership alone, by scores in [0, 1].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectionBias {
    /// One list `[E]` for each MoE layer, in order.
    pub bias: Vec<Vec<f32>>,
}

#[derive(Debug)]
struct BiasRule(Vec<f32>);

impl SelectionBias {
    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of layers or of experts, and for numbers that are not finite;
    /// [`Error::Unsupported`] for SparseMixer, which selects by logits alone.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        model.router().check_bias()?;
        RunTimeRouting::by_layer(lists(model.config(), &self.bias, "bias")?, |_, _, bias| Ok(BiasRule(bias.to_vec())))
    }
}

/// A list `[E]` for each MoE layer of a model, in order: the layers with their numbers of experts and their lists.
///
/// # Errors
/// [`Error::Input`] names `what` for another number of lists than the model has MoE layers, and for those that
/// [`check_values`] refuses.
pub(super) fn lists<'v>(
    config: &ModelConfig,
    values: &'v [Vec<f32>],
    what: &str,
) -> Result<Vec<(usize, usize, &'v [f32])>> {
    let lists: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
    let of_layers = PerLayer::Each(lists).of(config, what)?;
    of_layers.iter().try_for_each(|(layer, experts, list)| check_values(list, *layer, *experts, what))?;
    Ok(of_layers)
}

/// Refuses another number of values than a layer has experts, and values that are not finite.
pub(super) fn check_values(values: &[f32], layer: usize, experts: usize, what: &str) -> Result<()> {
    if values.len() != experts || values.iter().any(|value| !value.is_finite()) {
        let found =
            format!("{} numbers{}", values.len(), if values.len() == experts { ", not all finite" } else { "" });
        return Err(Error::input(format!("{what} of layer {layer}"), found, format!("{experts} finite numbers")));
    }
    Ok(())
}

impl Members for BiasRule {
    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed> {
        if self.0.iter().all(|bias| *bias == 0.0) {
            return Ok(router.route(tokens.logits, tokens.experts, tokens.bias));
        }
        let bias: Vec<f32> = match tokens.bias {
            Some(own) => own.iter().zip(&self.0).map(|(own, more)| own + more).collect(),
            None => self.0.clone(),
        };
        Ok(router.route(tokens.logits, tokens.experts, Some(&bias)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::overlay::RoutingRule;

    pub fn rule(bias: Vec<f32>) -> impl RoutingRule {
        BiasRule(bias)
    }
}
