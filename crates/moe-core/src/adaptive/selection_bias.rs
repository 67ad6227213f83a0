//! A bias on the choice of experts.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{RunTimeRouting, per_layer::PerLayer};
use crate::{
    Model,
    error::{Error, Result},
    overlay::{RouterTokens, RoutingRule, RuleGradients},
    router::Routed,
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
        let mut routing = RunTimeRouting::default();
        let indices: Vec<usize> = (0..self.bias.len()).collect();
        for (layer, experts, index) in PerLayer::Each(indices).of(model.config(), "bias")? {
            check_values(&self.bias[index], layer, experts, "bias")?;
            routing.rules.insert(layer, Arc::new(BiasRule(self.bias[index].clone())));
        }
        Ok(routing)
    }
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

impl RoutingRule for BiasRule {
    fn route(&self, tokens: &RouterTokens<'_>) -> Result<Routed> {
        if self.0.iter().all(|bias| *bias == 0.0) {
            return Ok(tokens.router.route(tokens.logits, tokens.experts, tokens.bias));
        }
        let bias: Vec<f32> = match tokens.bias {
            Some(own) => own.iter().zip(&self.0).map(|(own, more)| own + more).collect(),
            None => self.0.clone(),
        };
        Ok(tokens.router.route(tokens.logits, tokens.experts, Some(&bias)))
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> Result<RuleGradients> {
        Ok(tokens.router.backward(tokens.logits, routed, d_weights).into())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn rule(bias: Vec<f32>) -> impl RoutingRule {
        BiasRule(bias)
    }
}
