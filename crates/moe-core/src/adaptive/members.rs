//! What most rules are: a choice of experts, weighed as a router weighs these alone.

use std::fmt::Debug;

use crate::{
    error::Result,
    overlay::{RouterTokens, RoutingRule, RuleGradients},
    router::{Combine, Routed, Router},
};

/// A rule that chooses experts; their weights, and the gradients of these, are what a router gives the chosen ones
/// alone.
pub(super) trait Members: Debug + Send + Sync {
    /// How weights follow from scores.
    fn combine(&self) -> Combine {
        Combine::Model
    }

    /// The experts of every token with the weights that `router`, the model's own under [`combine`](Self::combine),
    /// gives them; 0 for those that a token does not go to.
    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed>;

    /// Whether the experts of a token do not depend on later tokens.
    fn looks_back_only(&self) -> bool {
        true
    }
}

impl<T: Members> RoutingRule for T {
    fn route(&self, tokens: &RouterTokens<'_>) -> Result<Routed> {
        self.choose(tokens, &tokens.router.with_combine(self.combine())?)
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> Result<RuleGradients> {
        let router = tokens.router.with_combine(self.combine())?;
        Ok(router.members_backward(tokens.logits, routed, d_weights).into())
    }

    fn is_causal(&self) -> bool {
        self.looks_back_only()
    }
}
