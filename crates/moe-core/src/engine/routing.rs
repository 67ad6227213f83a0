//! Routing of a layer's tokens under a routing overlay, and its gradients.

use std::{borrow::Cow, sync::Arc};

use burn::tensor::Tensor;

use crate::{
    error::Result,
    overlay::{
        LogitTransform, RouterTokens, RoutingOverlay, RoutingRule, RuleGradients,
        routing::{check_removed, check_rule, refusal},
    },
    router::{Dispatch, Routed},
    trace::{LayerTrace, WaveInfo},
};

/// Routing of the tokens of one layer, as the model applies it.
pub(super) struct LayerRouting {
    /// Experts and weights as applied.
    pub applied: Routed,
    /// Factor of the weights.
    scale: f32,
    /// What an overlay changed.
    changed: Option<Changed>,
    /// Where experts have factors on their weights.
    scaled: Option<Scaled>,
}

/// Factors on the weights of experts.
struct Scaled {
    /// `[E]`.
    factors: Arc<[f32]>,
    /// The routing by the model's rule before them.
    rule: Routed,
}

impl Scaled {
    fn apply(&self) -> Routed {
        let mut routed = self.rule.clone();
        self.on(&routed.selected, &mut routed.weights);
        routed
    }

    fn on(&self, selected: &[u32], values: &mut [f32]) {
        values.iter_mut().zip(selected).for_each(|(value, &e)| *value *= self.factors[e as usize]);
    }
}

struct Changed {
    /// What changed the logits, and what they became.
    logits: Option<(Arc<dyn LogitTransform>, Vec<f32>)>,
    /// What routed in place of the model's rule.
    by: Option<Arc<dyn RoutingRule>>,
    /// By that, or the model's rule.
    rule: Routed,
    /// After the overlay saw them, before its gains.
    seen: Routed,
    gains: Option<Vec<f32>>,
}

/// Gradients of a layer's routing.
pub(super) struct RoutingGradients {
    /// With respect to the logits that tokens were routed by `[T, E]`.
    pub logits: Vec<f32>,
    /// With respect to what the router reads, besides the way through the logits `[T, H]`.
    pub input: Option<Tensor<2>>,
    /// With respect to a factor on the weights of each expert `[E]`.
    pub gains: Vec<f64>,
}

impl LayerRouting {
    /// Routes tokens by the router's logits.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for an overlay that does not fit the layer.
    pub fn new(
        tokens: &RouterTokens<'_>,
        scales: Option<&Arc<[f32]>>,
        overlay: Option<&dyn RoutingOverlay>,
    ) -> Result<Self> {
        let RouterTokens { layer, experts, bias, router, .. } = *tokens;
        let scaled = |rule: Routed| match scales {
            Some(factors) => {
                let scaled = Scaled { factors: factors.clone(), rule };
                (scaled.apply(), Some(scaled))
            }
            None => (rule, None),
        };
        let Some(overlay) = overlay else {
            let (applied, scaled) = scaled(router.route(tokens.logits, experts, bias));
            return Ok(Self { applied, scale: router.scale(), changed: None, scaled });
        };
        let router = match overlay.top_k() {
            Some(top_k) => &router.at_most(top_k),
            None => router,
        };
        check_removed(overlay, layer, experts, router)?;
        check_rule(overlay, layer)?;
        let logits = match overlay.logits(layer) {
            Some(by) => {
                let logits = by.forward(tokens)?;
                if logits.len() != tokens.logits.len() {
                    let expected = format!("{} numbers", tokens.logits.len());
                    return Err(refusal("changed logits", layer, format!("{} numbers", logits.len()), expected));
                }
                Some((by, logits))
            }
            None => None,
        };
        let tokens = RouterTokens { router, ..*tokens };
        let tokens = match &logits {
            Some((_, logits)) => tokens.with_logits(logits),
            None => tokens,
        };
        let by = overlay.rule(layer);
        let (rule, scaled) = match &by {
            Some(by) => {
                let routed = by.route(&tokens)?;
                let k = routed.top_k;
                let slots = tokens.tokens() * k;
                let expected = Routed { experts, top_k: k, selected: vec![u32::MAX; slots], weights: vec![0.0; slots] };
                check_routed(layer, &expected, &routed)?;
                scaled(routed)
            }
            None => {
                let removed = overlay.removed(layer).unwrap_or_default();
                scaled(router.route_without(tokens.logits, experts, bias, removed))
            }
        };
        let mut seen = rule.clone();
        overlay.routed(layer, &mut seen);
        check_routed(layer, &rule, &seen)?;
        let gains = overlay.gains(layer);
        if let Some(gains) = gains.as_ref().filter(|gains| gains.len() != experts) {
            return Err(refusal("gains", layer, format!("{} numbers", gains.len()), format!("{experts} numbers")));
        }
        let mut applied = seen.clone();
        if let Some(gains) = &gains {
            applied.weights.iter_mut().zip(&applied.selected).for_each(|(w, &e)| *w *= gains[e as usize]);
        }
        // The weights of another rule are what it says.
        let scale = if by.is_some() { 1.0 } else { router.scale() };
        Ok(Self { applied, scale, changed: Some(Changed { logits, by, rule, seen, gains }), scaled })
    }

    /// The same with these choices `[T, k]` left out: their weights are 0 and no expert sees them.
    pub fn skipping(mut self, skipped: &[bool]) -> Self {
        let zero = |weights: &mut [f32]| {
            weights.iter_mut().zip(skipped).filter(|(_, skipped)| **skipped).for_each(|(weight, _)| *weight = 0.0);
        };
        let rule = self.applied.clone();
        zero(&mut self.applied.weights);
        match &mut self.changed {
            Some(changed) => zero(&mut changed.seen.weights),
            None => {
                let seen = self.applied.clone();
                self.changed = Some(Changed { logits: None, by: None, rule, seen, gains: None });
            }
        }
        self
    }

    /// The logits that tokens were routed by, given those of the router.
    pub fn logits<'a>(&'a self, own: &'a [f32]) -> &'a [f32] {
        let changed = self.changed.as_ref().and_then(|changed| changed.logits.as_ref());
        changed.map_or(own, |(_, logits)| logits)
    }

    /// What is shown of it; `logits` as the router gives them, without removed experts.
    pub fn trace<'a>(&'a self, layer: usize, wave: &'a WaveInfo, logits: &'a [f32]) -> LayerTrace<'a> {
        let Routed { experts, top_k, selected, weights } = &self.applied;
        LayerTrace { layer, wave, experts: *experts, top_k: *top_k, logits, selected, weights, scale: self.scale }
    }

    /// Groups the tokens by expert, the first `main` of each token's experts. Skipped experts are left out, and experts
    /// whose gain is 0 unless they are `watched`.
    pub fn dispatch(&self, watched: bool, main: usize) -> Dispatch {
        let k = self.applied.top_k;
        let runs = |slot: usize| main >= k || slot % k < main;
        match &self.changed {
            None => self.applied.dispatch_where(runs),
            Some(changed) => {
                let weights = if watched { &changed.seen.weights } else { &self.applied.weights };
                self.applied.dispatch_where(|slot| weights[slot] != 0.0 && runs(slot))
            }
        }
    }

    /// Whether the weights are those of the model's own rule.
    pub fn is_own(&self) -> bool {
        let own = |changed: &Changed| changed.by.is_none() && changed.logits.is_none() && changed.rule == self.applied;
        self.changed.as_ref().is_none_or(own)
    }

    /// Gradients at the logits that tokens were routed by, from that of each weight as applied `[T, k]`. `tokens` have
    /// the logits of the router.
    ///
    /// # Errors
    /// Those of the overlay's rule.
    pub fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        d_weights: &[f32],
        overlay: Option<&dyn RoutingOverlay>,
        parameters: bool,
    ) -> Result<RoutingGradients> {
        let tokens = tokens.with_logits(self.logits(tokens.logits));
        let layer = tokens.layer;
        let (rule, seen, gains) = match &self.changed {
            None => (&self.applied, &self.applied, None),
            Some(changed) => (&changed.rule, &changed.seen, changed.gains.as_ref()),
        };
        let mut d_gains = vec![0.0f64; self.applied.experts];
        for ((&e, d), w) in seen.selected.iter().zip(d_weights).zip(&seen.weights) {
            d_gains[e as usize] += f64::from(*d) * f64::from(*w);
        }
        let mut d = Cow::Borrowed(d_weights);
        if let Some(gains) = gains {
            d.to_mut().iter_mut().zip(&seen.selected).for_each(|(d, &e)| *d *= gains[e as usize]);
        }
        let mut removed = &[][..];
        if let Some(overlay) = overlay {
            if rule != seen {
                overlay.routed_backward(layer, rule, seen, d.to_mut());
            }
            removed = overlay.removed(layer).unwrap_or_default();
        }
        let mut rule = rule;
        if let Some(scaled) = &self.scaled {
            scaled.on(&rule.selected, d.to_mut());
            rule = &scaled.rule;
        }
        let RuleGradients { logits, input } = match self.changed.as_ref().and_then(|changed| changed.by.as_ref()) {
            Some(by) => by.backward(&tokens, rule, &d, parameters)?,
            None => tokens.router.backward_without(tokens.logits, rule, &d, removed).into(),
        };
        Ok(RoutingGradients { logits, input, gains: d_gains })
    }

    /// Gradients at the logits of the router, from that of those that tokens were routed by `[T, E]`.
    ///
    /// # Errors
    /// Those of what changed them.
    pub fn through_change(
        &self,
        tokens: &RouterTokens<'_>,
        d_logits: Vec<f32>,
        parameters: bool,
    ) -> Result<RuleGradients> {
        match self.changed.as_ref().and_then(|changed| changed.logits.as_ref()) {
            Some((by, _)) => by.backward(tokens, &d_logits, parameters),
            None => Ok(d_logits.into()),
        }
    }
}

/// Checks what an overlay made of the routing: a token must not go to one expert twice.
fn check_routed(layer: usize, before: &Routed, after: &Routed) -> Result<()> {
    let (experts, k) = (before.experts, before.top_k);
    let shape = |r: &Routed| (r.experts, r.top_k, r.selected.len(), r.weights.len());
    if shape(before) != shape(after) {
        let (found, expected) = (format!("{:?}", shape(after)), format!("{:?}", shape(before)));
        return Err(refusal("experts, experts per token, slots and weights", layer, found, expected));
    }
    if before.selected == after.selected {
        return Ok(());
    }
    for (t, selected) in after.selected.chunks_exact(k.max(1)).enumerate() {
        let twice = selected.iter().enumerate().any(|(i, e)| selected[..i].contains(e));
        if twice || selected.iter().any(|e| *e as usize >= experts) {
            let found = format!("{selected:?} for token {t}");
            return Err(refusal("selected experts", layer, found, format!("different ones of {experts}")));
        }
    }
    Ok(())
}

/// The logits as the pruned router would give them, minus infinity for removed experts.
pub(super) fn visible_logits<'a>(logits: &'a [f32], experts: usize, removed: &[u32]) -> Cow<'a, [f32]> {
    let mut logits = Cow::Borrowed(logits);
    if !removed.is_empty() {
        for row in logits.to_mut().chunks_exact_mut(experts) {
            removed.iter().for_each(|&e| row[e as usize] = f32::NEG_INFINITY);
        }
    }
    logits
}
