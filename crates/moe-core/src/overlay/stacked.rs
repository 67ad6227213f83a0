//! Two changes of the routing, one on top of the other.

use std::sync::Arc;

use super::{LogitTransform, RouterTokens, RoutingOverlay, RoutingRule, RuleGradients};
use crate::{
    error::{Error, Result},
    router::Routed,
};

/// An overlay on top of another: the lower one changes the model, the upper one what comes of it. Gains multiply,
/// logits are changed one after the other, and so is what was routed; of router weights, biases and the most experts
/// per token, those of the upper one count.
pub struct StackedRouting {
    lower: Arc<dyn RoutingOverlay>,
    upper: Arc<dyn RoutingOverlay>,
}

impl StackedRouting {
    /// `upper` on `lower`, for a model of so many decoder layers.
    ///
    /// # Errors
    /// [`Error::Input`] for a layer whose rule, or whose experts, both change: neither could be asked after the other.
    pub fn new(lower: Arc<dyn RoutingOverlay>, upper: Arc<dyn RoutingOverlay>, layers: usize) -> Result<Self> {
        for layer in 0..layers {
            let both = |of: fn(&dyn RoutingOverlay, usize) -> bool| of(&*lower, layer) && of(&*upper, layer);
            if both(|overlay, layer| overlay.rule(layer).is_some()) {
                return Err(Error::input(format!("rules that route layer {layer}"), "two", "one"));
            }
            if both(|overlay, layer| overlay.removed(layer).is_some()) {
                return Err(Error::input(format!("overlays that remove experts of layer {layer}"), "two", "one"));
            }
        }
        Ok(Self { lower, upper })
    }
}

impl RoutingOverlay for StackedRouting {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        self.upper.removed(layer).or_else(|| self.lower.removed(layer))
    }

    fn top_k(&self) -> Option<usize> {
        self.upper.top_k().or_else(|| self.lower.top_k())
    }

    fn gains(&self, layer: usize) -> Option<Vec<f32>> {
        match (self.lower.gains(layer), self.upper.gains(layer)) {
            (Some(lower), Some(upper)) => Some(lower.iter().zip(upper).map(|(a, b)| a * b).collect()),
            (lower, upper) => upper.or(lower),
        }
    }

    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.upper.router(layer).or_else(|| self.lower.router(layer))
    }

    fn router_bias(&self, layer: usize) -> Option<Vec<f32>> {
        self.upper.router_bias(layer).or_else(|| self.lower.router_bias(layer))
    }

    fn selection_bias(&self, layer: usize) -> Option<Vec<f32>> {
        self.upper.selection_bias(layer).or_else(|| self.lower.selection_bias(layer))
    }

    fn logits(&self, layer: usize) -> Option<Arc<dyn LogitTransform>> {
        match (self.lower.logits(layer), self.upper.logits(layer)) {
            (Some(lower), Some(upper)) => Some(Arc::new(Chained { lower, upper })),
            (lower, upper) => upper.or(lower),
        }
    }

    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.upper.rule(layer).or_else(|| self.lower.rule(layer))
    }

    fn routed(&self, layer: usize, routed: &mut Routed) {
        self.lower.routed(layer, routed);
        self.upper.routed(layer, routed);
    }

    fn routed_backward(&self, layer: usize, before: &Routed, after: &Routed, d_weights: &mut [f32]) {
        let mut between = before.clone();
        self.lower.routed(layer, &mut between);
        self.upper.routed_backward(layer, &between, after, d_weights);
        self.lower.routed_backward(layer, before, &between, d_weights);
    }
}

/// Two changes of the logits, one after the other.
#[derive(Debug)]
struct Chained {
    lower: Arc<dyn LogitTransform>,
    upper: Arc<dyn LogitTransform>,
}

impl LogitTransform for Chained {
    fn forward(&self, tokens: &RouterTokens<'_>) -> Result<Vec<f32>> {
        let between = self.lower.forward(tokens)?;
        self.upper.forward(&tokens.with_logits(&between))
    }

    fn backward(&self, tokens: &RouterTokens<'_>, d_logits: &[f32], parameters: bool) -> Result<RuleGradients> {
        let between = self.lower.forward(tokens)?;
        let upper = self.upper.backward(&tokens.with_logits(&between), d_logits, parameters)?;
        let lower = self.lower.backward(tokens, &upper.logits, parameters)?;
        let input = crate::layers::sum_of([upper.input, lower.input]);
        Ok(RuleGradients { logits: lower.logits, input })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExpertGains, RemoveExperts, SkipExperts};

    #[test]
    fn gains_multiply_and_weights_are_skipped_after_what_is_below() {
        let gains = |values: [f32; 2]| Arc::new(ExpertGains::new().set(1, values.to_vec()));
        let both = StackedRouting::new(gains([2.0, 3.0]), gains([0.5, 4.0]), 2).unwrap();
        assert_eq!(both.gains(1).unwrap(), [1.0, 12.0]);
        let skip = |beta| Arc::new(SkipExperts { beta: [(0, beta)].into(), renormalize: false });
        let both = StackedRouting::new(skip(0.3), skip(0.6), 1).unwrap();
        let mut routed = Routed { experts: 3, top_k: 3, selected: vec![0, 1, 2], weights: vec![0.5, 0.3, 0.1] };
        let before = routed.clone();
        both.routed(0, &mut routed);
        assert_eq!(routed.weights, [0.5, 0.3, 0.0]);
        let mut d = [1.0, 2.0, 3.0];
        both.routed_backward(0, &before, &routed, &mut d);
        assert_eq!(d, [1.0, 2.0, 0.0]);
    }

    #[test]
    fn two_overlays_that_remove_experts_of_a_layer_are_refused() {
        let removed = || Arc::new(RemoveExperts::new().remove(1, [0]));
        let error = StackedRouting::new(removed(), removed(), 2).err().unwrap().to_string();
        assert!(error.contains("layer 1"), "{error}");
        assert!(StackedRouting::new(removed(), removed(), 1).is_ok());
    }
}
