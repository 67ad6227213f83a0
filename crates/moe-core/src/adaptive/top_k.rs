//! Another number of experts per token.

use serde::{Deserialize, Serialize};

use super::{PerLayer, RunTimeRouting};
use crate::{
    Model,
    error::{Error, Result},
    overlay::{RouterTokens, RoutingRule, RuleGradients},
    router::{Combine, Routed},
};

/// Sends every token to its `k` best experts, weighed as the model weighs those of its own number. What a config can
/// hold as `num_experts_per_tok`, where all layers have the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopK {
    /// Experts per token, at least 1 and at most those that a token can reach.
    pub k: PerLayer<usize>,
    /// How their weights follow from the scores.
    #[serde(default)]
    pub combine: Combine,
}

/// The rule of one layer.
#[derive(Debug)]
pub(super) struct KRule {
    pub k: usize,
    pub combine: Combine,
}

impl TopK {
    /// The rule of a layer with `k` experts per token.
    pub(super) fn rule(&self, k: usize) -> KRule {
        KRule { k, combine: self.combine }
    }

    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] names the layer whose number is out of range; [`Error::Unsupported`] for weights that the
    /// model's rule cannot give.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        model.router().with_combine(self.combine)?;
        RunTimeRouting::by_layer(self.k.of(model.config(), "k")?, |layer, experts, k| {
            check_k(model, layer, experts, k)?;
            Ok(self.rule(k))
        })
    }
}

/// Refuses a number of experts per token that a layer cannot have.
pub(super) fn check_k(model: &Model, layer: usize, experts: usize, k: usize) -> Result<()> {
    let most = model.router().reachable(experts);
    match (1..=most).contains(&k) {
        true => Ok(()),
        false => Err(Error::input(format!("experts per token of layer {layer}"), k, format!("1 to {most}"))),
    }
}

impl RoutingRule for KRule {
    fn route(&self, tokens: &RouterTokens<'_>) -> Result<Routed> {
        let router = tokens.router.with_top_k(self.k).with_combine(self.combine)?;
        Ok(router.route(tokens.logits, tokens.experts, tokens.bias))
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> Result<RuleGradients> {
        let router = tokens.router.with_combine(self.combine)?;
        Ok(router.backward(tokens.logits, routed, d_weights).into())
    }
}
