//! Routing of a layer's tokens under a routing overlay, and its gradients.

use std::{borrow::Cow, sync::Arc};

use burn::tensor::Tensor;

use crate::{
    error::{Error, Result},
    kernels::rows::{RowAccumulator, gather_rows},
    overlay::{
        LogitTransform, RouterTokens, RoutingOverlay, RoutingRule, RuleGradients,
        routing::{by_table, check_removed, check_rule, refusal},
    },
    router::{Dispatch, Routed},
    trace::{LayerTrace, WaveInfo},
};

/// Routing of the tokens of one layer, as the model applies it.
pub(super) struct LayerRouting {
    /// Experts and weights as applied. A choice of an identity expert has another expert in its place, without weight.
    pub applied: Routed,
    /// Where the layer has identity experts.
    pub identity: Option<Identity>,
    /// Choices `[T, k]` that no routed expert sees; empty where every choice is seen by one.
    idle: Vec<bool>,
    /// Factor of the weights.
    scale: f32,
    /// What an overlay changed.
    changed: Option<Changed>,
    /// Where experts have factors on their weights.
    scaled: Option<Scaled>,
}

/// Identity experts of a layer, which are the last ones that its router chooses from.
pub(super) struct Identity {
    /// Routing as applied among routed and identity experts.
    all: Routed,
    /// What each token gets back of what its identity experts are given `[T]`.
    pub weights: Vec<f32>,
}

impl Identity {
    /// Tokens that go to an identity expert.
    fn rows(&self) -> Vec<u32> {
        (0u32..).zip(&self.weights).filter(|(_, weight)| **weight != 0.0).map(|(row, _)| row).collect()
    }

    /// Adds what identity experts give of what they read, `z [T, H]`.
    pub fn add_outputs(&self, z: &Tensor<2>, sum: &mut RowAccumulator) {
        let rows = self.rows();
        let weights: Vec<f32> = rows.iter().map(|row| self.weights[*row as usize]).collect();
        sum.add_rows(&rows, Some(&weights), &gather_rows(z, &rows));
    }

    /// Whether a choice is one of an identity expert, where there are so many routed ones.
    fn is_chosen(all: &Routed, experts: usize, slot: usize) -> bool {
        all.selected[slot] as usize >= experts
    }
}

/// The same routing among the first `experts` experts alone. In place of a later one stands one that the token does not
/// go to, without weight.
fn among_first(all: &Routed, experts: usize) -> Routed {
    let mut routed = Routed { experts, ..all.clone() };
    if routed.top_k == 0 {
        return routed;
    }
    let tokens = routed.selected.chunks_exact_mut(routed.top_k).zip(routed.weights.chunks_exact_mut(routed.top_k));
    for (selected, weights) in tokens {
        for slot in 0..selected.len() {
            if selected[slot] as usize >= experts {
                let free = (0..experts as u32).find(|expert| !selected.contains(expert));
                (selected[slot], weights[slot]) = (free.unwrap_or(0), 0.0);
            }
        }
    }
    routed
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
        identities: usize,
        scales: Option<&Arc<[f32]>>,
        overlay: Option<&dyn RoutingOverlay>,
    ) -> Result<Self> {
        let RouterTokens { layer, experts, router, .. } = *tokens;
        let own = experts - identities;
        let scaled = |rule: Routed| match scales {
            Some(factors) => {
                let scaled = Scaled { factors: factors.clone(), rule };
                (scaled.apply(), Some(scaled))
            }
            None => (rule, None),
        };
        let Some(overlay) = overlay else {
            let (applied, scaled) = scaled(tokens.route(router, &[])?);
            return Ok(Self::of(applied, own, router.scale(), None, scaled));
        };
        if identities > 0 && (overlay.rule(layer).is_some() || overlay.logits(layer).is_some()) {
            let what = "other rules and other logits of the routing of layer";
            return Err(Error::Unsupported(format!("{what} {layer}, which has identity experts")));
        }
        if tokens.table.is_some() && overlay.rule(layer).is_some() {
            return Err(Error::Unsupported(by_table(layer)));
        }
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
                scaled(tokens.route(router, removed)?)
            }
        };
        let mut seen = rule.clone();
        if identities == 0 {
            overlay.routed(layer, &mut seen);
            check_routed(layer, &rule, &seen)?;
        } else {
            let before = among_first(&rule, own);
            let mut after = before.clone();
            overlay.routed(layer, &mut after);
            check_routed(layer, &before, &after)?;
            for slot in (0..seen.selected.len()).filter(|slot| !Identity::is_chosen(&rule, own, *slot)) {
                (seen.selected[slot], seen.weights[slot]) = (after.selected[slot], after.weights[slot]);
            }
        }
        let mut gains = overlay.gains(layer);
        if let Some(gains) = gains.as_ref().filter(|gains| gains.len() != own) {
            return Err(refusal("gains", layer, format!("{} numbers", gains.len()), format!("{own} numbers")));
        }
        if let Some(gains) = &mut gains {
            gains.resize(experts, 1.0);
        }
        let mut applied = seen.clone();
        if let Some(gains) = &gains {
            applied.weights.iter_mut().zip(&applied.selected).for_each(|(w, &e)| *w *= gains[e as usize]);
        }
        // The weights of another rule are what it says.
        let scale = if by.is_some() { 1.0 } else { router.scale() };
        Ok(Self::of(applied, own, scale, Some(Changed { logits, by, rule, seen, gains }), scaled))
    }

    /// Routing as applied among all experts, of which the first `own` are routed ones.
    fn of(all: Routed, own: usize, scale: f32, changed: Option<Changed>, scaled: Option<Scaled>) -> Self {
        let mut idle: Vec<bool> = match &changed {
            Some(changed) => changed.seen.weights.iter().map(|weight| *weight == 0.0).collect(),
            None => Vec::new(),
        };
        if all.experts == own {
            return Self { applied: all, identity: None, idle, scale, changed, scaled };
        }
        idle.resize(all.selected.len(), false);
        let mut weights = vec![0.0; all.selected.len() / all.top_k.max(1)];
        for slot in (0..all.selected.len()).filter(|slot| Identity::is_chosen(&all, own, *slot)) {
            idle[slot] = true;
            weights[slot / all.top_k] += all.weights[slot];
        }
        let applied = among_first(&all, own);
        Self { applied, identity: Some(Identity { all, weights }), idle, scale, changed, scaled }
    }

    /// Routing as applied among routed and identity experts.
    fn all(&self) -> &Routed {
        self.identity.as_ref().map_or(&self.applied, |identity| &identity.all)
    }

    /// The choices `[T, k]` of identity experts.
    pub fn identity_slots(&self) -> impl Iterator<Item = usize> + '_ {
        let own = self.applied.experts;
        let of = move |all: &Routed| {
            (0..all.selected.len()).filter(|slot| Identity::is_chosen(all, own, *slot)).collect::<Vec<_>>()
        };
        self.identity.as_ref().map(|identity| of(&identity.all)).unwrap_or_default().into_iter()
    }

    /// The same with these choices `[T, k]` left out: their weights are 0 and no expert sees them.
    pub fn skipping(mut self, skipped: &[bool]) -> Self {
        let zero = |weights: &mut [f32]| {
            weights.iter_mut().zip(skipped).filter(|(_, skipped)| **skipped).for_each(|(weight, _)| *weight = 0.0);
        };
        let rule = self.all().clone();
        let own = self.applied.experts;
        let mut all = self.identity.take().map_or(self.applied, |identity| identity.all);
        zero(&mut all.weights);
        let changed = match self.changed {
            Some(mut changed) => {
                zero(&mut changed.seen.weights);
                changed
            }
            None => Changed { logits: None, by: None, rule, seen: all.clone(), gains: None },
        };
        Self::of(all, own, self.scale, Some(changed), self.scaled)
    }

    /// The logits that tokens were routed by, given those of the router.
    pub fn logits<'a>(&'a self, own: &'a [f32]) -> &'a [f32] {
        let changed = self.changed.as_ref().and_then(|changed| changed.logits.as_ref());
        changed.map_or(own, |(_, logits)| logits)
    }

    /// What is shown of it; `logits` as the router gives them, without removed experts.
    pub fn trace<'a>(&'a self, layer: usize, wave: &'a WaveInfo, logits: &'a [f32]) -> LayerTrace<'a> {
        let Routed { experts, top_k, selected, weights } = &self.applied;
        let (experts, top_k, scale, idle) = (*experts, *top_k, self.scale, self.idle.as_slice());
        LayerTrace { layer, wave, experts, top_k, logits, selected, weights, scale, idle }
    }

    /// Groups the tokens by expert, the first `main` of each token's experts. Skipped experts are left out, and experts
    /// whose gain is 0 unless they are `watched`.
    pub fn dispatch(&self, watched: bool, main: usize) -> Dispatch {
        let k = self.applied.top_k;
        let runs = |slot: usize| main >= k || slot % k < main;
        let own = self.applied.experts;
        let runs =
            |slot: usize| runs(slot) && !self.identity.as_ref().is_some_and(|i| Identity::is_chosen(&i.all, own, slot));
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
        let own = |changed: &Changed| changed.by.is_none() && changed.logits.is_none() && changed.rule == *self.all();
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
            None => (self.all(), self.all(), None),
            Some(changed) => (&changed.rule, &changed.seen, changed.gains.as_ref()),
        };
        let own = self.applied.experts;
        let mut d_gains = vec![0.0f64; rule.experts];
        for ((&e, d), w) in seen.selected.iter().zip(d_weights).zip(&seen.weights) {
            d_gains[e as usize] += f64::from(*d) * f64::from(*w);
        }
        let mut d = Cow::Borrowed(d_weights);
        if let Some(gains) = gains {
            d.to_mut().iter_mut().zip(&seen.selected).for_each(|(d, &e)| *d *= gains[e as usize]);
        }
        let mut removed = &[][..];
        if let Some(overlay) = overlay {
            if rule != seen && self.identity.is_none() {
                overlay.routed_backward(layer, rule, seen, d.to_mut());
            } else if rule != seen {
                let mut through = d.to_vec();
                overlay.routed_backward(layer, &among_first(rule, own), &among_first(seen, own), &mut through);
                let slots = (0..through.len()).filter(|slot| !Identity::is_chosen(rule, own, *slot));
                slots.for_each(|slot| d.to_mut()[slot] = through[slot]);
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
        d_gains.truncate(own);
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

/// The first `own` of `columns` numbers of every row.
pub(super) fn first_columns(values: &[f32], columns: usize, own: usize) -> Cow<'_, [f32]> {
    if columns == own {
        return Cow::Borrowed(values);
    }
    Cow::Owned(values.chunks_exact(columns).flat_map(|row| &row[..own]).copied().collect())
}

/// The logits of routed experts as the pruned router would give them, minus infinity for removed experts. Every row has
/// `columns` logits, of which the first `experts` are theirs.
pub(super) fn visible_logits<'a>(logits: &'a [f32], columns: usize, experts: usize, removed: &[u32]) -> Cow<'a, [f32]> {
    let mut logits = first_columns(logits, columns, experts);
    if !removed.is_empty() {
        for row in logits.to_mut().chunks_exact_mut(experts) {
            removed.iter().for_each(|&e| row[e as usize] = f32::NEG_INFINITY);
        }
    }
    logits
}
