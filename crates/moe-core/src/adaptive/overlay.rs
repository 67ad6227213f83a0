//! The rules of all layers as one overlay.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::ModelConfig;

use super::per_layer::moe_layers;
use crate::{
    error::Result,
    overlay::{LogitTransform, RoutingOverlay, RoutingRule, SkipExperts},
    router::Routed,
};

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

impl RunTimeRouting {
    /// The same rule in all MoE layers of a model.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a model without any.
    pub(super) fn everywhere(config: &ModelConfig, rule: impl RoutingRule + 'static) -> Result<Self> {
        let rule: Arc<dyn RoutingRule> = Arc::new(rule);
        let rules = moe_layers(config)?.into_iter().map(|(layer, _)| (layer, rule.clone())).collect();
        Ok(Self { rules, ..Self::default() })
    }

    /// A rule for every layer of these, which have a number of experts and a value each.
    ///
    /// # Errors
    /// What `rule` refuses.
    pub(super) fn by_layer<V, R: RoutingRule + 'static>(
        layers: Vec<(usize, usize, V)>,
        rule: impl Fn(usize, usize, V) -> Result<R>,
    ) -> Result<Self> {
        let made =
            |(layer, experts, value)| Ok((layer, Arc::new(rule(layer, experts, value)?) as Arc<dyn RoutingRule>));
        Ok(Self { rules: layers.into_iter().map(made).collect::<Result<_>>()?, ..Self::default() })
    }
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
