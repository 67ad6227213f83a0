//! The rules of all layers as one overlay.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::overlay::{LogitTransform, RoutingOverlay, RoutingRule, SkipExperts};
use crate::router::Routed;

/// Rules, changes of logits, routers and skipped experts by layer: what a [`RoutingConfig`](super::RoutingConfig) makes
/// of a model.
#[derive(Clone, Debug, Default)]
pub struct RunTimeRouting {
    /// Rules in place of the model's.
    pub rules: BTreeMap<usize, Arc<dyn RoutingRule>>,
    /// Changes of the logits.
    pub logits: BTreeMap<usize, Arc<dyn LogitTransform>>,
    /// Router weights `[E, H]` in place of the model's.
    pub routers: BTreeMap<usize, Vec<f32>>,
    /// Experts that weigh little.
    pub skip: Option<SkipExperts>,
}

impl RoutingOverlay for RunTimeRouting {
    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.routers.get(&layer).cloned()
    }

    fn logits(&self, layer: usize) -> Option<Arc<dyn LogitTransform>> {
        self.logits.get(&layer).cloned()
    }

    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.rules.get(&layer).cloned()
    }

    fn routed(&self, layer: usize, routed: &mut Routed) {
        if let Some(skip) = &self.skip {
            skip.routed(layer, routed);
        }
    }

    fn routed_backward(&self, layer: usize, before: &Routed, after: &Routed, d_weights: &mut [f32]) {
        match &self.skip {
            Some(skip) => skip.routed_backward(layer, before, after, d_weights),
            None => debug_assert!(before == after, "nothing else changes what was routed"),
        }
    }
}
