//! Running a model under changed routing.

use std::{collections::BTreeMap, fmt::Debug, sync::Arc};

use burn::tensor::Tensor;
use moe_checkpoint::{ExpertTable, ModelConfig};

use crate::{
    error::{Error, Result},
    router::{Routed, Router},
    trace::WaveInfo,
};

/// Changes how tokens are routed: experts taken out, gains, other router weights, skipped experts.
///
/// Per layer the changes apply in this order: [`router`](Self::router) gives the logits, [`logits`](Self::logits)
/// changes them, [`removed`](Self::removed) leaves out experts, the model's rule, or [`rule`](Self::rule) in its place,
/// selects and weighs, [`routed`](Self::routed) changes what it found, [`gains`](Self::gains) multiply the weights.
/// Methods are asked again whenever a layer runs, so that they may answer differently in the next sweep, but not within
/// one.
pub trait RoutingOverlay: Send + Sync {
    /// Experts that no token may be routed to, strictly ascending. Equal to a router without their rows and biases.
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        let _ = layer;
        None
    }

    /// Experts per token at most, in all layers: what a config says of a pruned model of which a layer has fewer left.
    /// The rules of [`RoutingOverlay::rule`] have numbers of their own.
    fn top_k(&self) -> Option<usize> {
        None
    }

    /// Factors `[E]` on the routing weights, after any normalization.
    fn gains(&self, layer: usize) -> Option<Vec<f32>> {
        let _ = layer;
        None
    }

    /// Router weight `[E, H]` used instead of the checkpoint's.
    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        let _ = layer;
        None
    }

    /// Bias `[E]` on the router's logits used instead of the checkpoint's, in a model that has one.
    fn router_bias(&self, layer: usize) -> Option<Vec<f32>> {
        let _ = layer;
        None
    }

    /// Bias `[E]` on the selection of experts used instead of the checkpoint's, in a model that has one.
    fn selection_bias(&self, layer: usize) -> Option<Vec<f32>> {
        let _ = layer;
        None
    }

    /// What changes the logits that a layer's router gives, before anything is selected by them.
    fn logits(&self, layer: usize) -> Option<Arc<dyn LogitTransform>> {
        let _ = layer;
        None
    }

    /// A rule that routes by the logits in place of the model's. It sees all experts, so that none can be removed
    /// beside it.
    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        let _ = layer;
        None
    }

    /// Changes the routing of each token. A weight of 0 means that the token skips the expert: it is not computed and
    /// not observed.
    fn routed(&self, layer: usize, routed: &mut Routed) {
        let _ = (layer, routed);
    }

    /// Turns gradients with respect to the weights after [`routed`](Self::routed), `[T, k]`, into those before it. As
    /// given, each weight was multiplied by a constant, or belongs to another expert than before and has no gradient.
    fn routed_backward(&self, layer: usize, before: &Routed, after: &Routed, d_weights: &mut [f32]) {
        let _ = layer;
        for (slot, d) in d_weights.iter_mut().enumerate() {
            let same = before.selected[slot] == after.selected[slot] && before.weights[slot] != 0.0;
            *d *= if same { after.weights[slot] / before.weights[slot] } else { 0.0 };
        }
    }
}

/// The tokens of an MoE layer as what routes them sees them: T tokens, E experts, hidden size H.
#[derive(Clone, Copy, Debug)]
pub struct RouterTokens<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// Experts, E.
    pub experts: usize,
    /// Router logits `[T, E]`.
    pub logits: &'a [f32],
    /// What the model adds for its own selection, if it does `[E]`.
    pub bias: Option<&'a [f32]>,
    /// What the router reads `[T, H]`, normed as it reads it; `None` where logits alone are known
    /// ([`Engine::route`](crate::Engine::route)).
    pub input: Option<&'a Tensor<2>>,
    /// The model's own rule.
    pub router: &'a Router,
    /// The experts of every token of the vocabulary, in a layer where scores do not choose them.
    pub table: Option<&'a ExpertTable>,
    /// The wave whose tokens they are, with the rows of every sequence; in generation, the tokens of one step.
    pub wave: &'a WaveInfo,
}

impl<'a> RouterTokens<'a> {
    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.logits.len() / self.experts.max(1)
    }

    /// What the router reads.
    ///
    /// # Errors
    /// [`Error::Input`] where logits alone are known.
    pub fn read(&self) -> Result<&'a Tensor<2>> {
        let missing =
            || refusal("input of the router", self.layer, "logits alone", "the tokens as the router reads them");
        self.input.ok_or_else(missing)
    }

    /// Where the tokens go by this rule without the experts `removed`, or by the table of the layer where it has one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the layer has a table and the ids of the tokens are not known.
    pub(crate) fn route(&self, router: &Router, removed: &[u32]) -> Result<Routed> {
        let Self { logits, experts, bias, .. } = *self;
        let Some(table) = self.table else { return Ok(router.route_without(logits, experts, bias, removed)) };
        if self.wave.ids.len() != self.tokens() {
            let (what, layer) = ("routing tokens whose ids are not known in layer", self.layer);
            return Err(Error::Unsupported(format!("{what} {layer}, which routes by a table of the vocabulary")));
        }
        Ok(router.route_by(table, &self.wave.ids, logits, experts, removed))
    }

    /// The same tokens with other logits `[T, E]`.
    pub fn with_logits<'b>(&self, logits: &'b [f32]) -> RouterTokens<'b>
    where
        'a: 'b,
    {
        RouterTokens { logits, ..*self }
    }
}

/// Gradients below a rule or a change of the logits.
#[derive(Clone, Debug)]
pub struct RuleGradients {
    /// With respect to the logits that were given `[T, E]`.
    pub logits: Vec<f32>,
    /// With respect to what the router reads, besides the way through the logits `[T, H]`.
    pub input: Option<Tensor<2>>,
}

impl From<Vec<f32>> for RuleGradients {
    fn from(logits: Vec<f32>) -> Self {
        Self { logits, input: None }
    }
}

/// A way of routing in place of a model's own: which experts a token goes to, with which weights. The number of experts
/// per token may be another one, the same for all tokens; those that a token does not need stand in it with a weight of
/// 0 and are not computed. A token never goes to an expert twice: what would count double has twice the weight. Factors
/// that a model has on the weights of its experts are applied to what the rule gives.
pub trait RoutingRule: Debug + Send + Sync {
    /// Routes tokens.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn route(&self, tokens: &RouterTokens<'_>) -> Result<Routed>;

    /// Gradients from that of each routing weight `[T, k]`. The choice of experts is not differentiated. With
    /// `parameters`, adds up those of whatever the rule trains.
    ///
    /// # Errors
    /// As [`route`](Self::route), and for rules without a gradient.
    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        parameters: bool,
    ) -> Result<RuleGradients>;

    /// Whether the routing of a token follows from the token and those before it in its sequence, whatever else is in
    /// the wave. Generation refuses rules of which that is not so: what they do to a prompt depends on its completion.
    fn is_causal(&self) -> bool {
        true
    }
}

/// Changes the logits of a router before anything is selected by them: shifts, steering, routers beside the model's.
/// Observers and losses see the changed logits.
pub trait LogitTransform: Debug + Send + Sync {
    /// The logits `[T, E]` in place of [`RouterTokens::logits`].
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn forward(&self, tokens: &RouterTokens<'_>) -> Result<Vec<f32>>;

    /// Gradients from that of the changed logits `[T, E]`. With `parameters`, adds up those of what is trained. Called
    /// from the last to the first layer of a sweep, once for each [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn backward(&self, tokens: &RouterTokens<'_>, d_logits: &[f32], parameters: bool) -> Result<RuleGradients>;
}

/// Refuses an overlay that does not fit the model.
///
/// # Errors
/// [`Error::Input`] names the layer, what was found and what was expected; [`Error::Unsupported`] for a rule of a layer
/// that routes by a table.
pub(crate) fn check(overlay: &dyn RoutingOverlay, config: &ModelConfig, router: &Router) -> Result<()> {
    for (layer, moe) in (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?))) {
        let experts = moe.num_experts();
        check_removed(overlay, layer, experts, router)?;
        check_rule(overlay, layer)?;
        if moe.by_table && overlay.rule(layer).is_some() {
            return Err(Error::Unsupported(by_table(layer)));
        }
        let (hidden, rows) = (config.hidden_size, moe.router_rows());
        for (what, found, expected) in [
            ("gains", overlay.gains(layer).map(|gains| gains.len()), experts),
            ("router weights", overlay.router(layer).map(|weights| weights.len()), rows * hidden),
            ("router biases", overlay.router_bias(layer).map(|bias| bias.len()), rows),
            ("selection biases", overlay.selection_bias(layer).map(|bias| bias.len()), rows),
        ] {
            if let Some(found) = found.filter(|found| *found != expected) {
                return Err(refusal(what, layer, format!("{found} numbers"), format!("{expected} numbers")));
            }
        }
    }
    Ok(())
}

/// Refuses removed experts that do not exist, or after which tokens cannot be routed.
///
/// # Errors
/// As [`check`].
pub(crate) fn check_removed(overlay: &dyn RoutingOverlay, layer: usize, experts: usize, router: &Router) -> Result<()> {
    let Some(removed) = overlay.removed(layer) else { return Ok(()) };
    let refuse = |found: String, expected: String| Err(refusal("removed experts", layer, found, expected));
    if removed.windows(2).any(|pair| pair[0] >= pair[1]) {
        return refuse(format!("{removed:?}"), "strictly ascending".into());
    }
    if let Some(expert) = removed.last().filter(|e| **e as usize >= experts) {
        return refuse(expert.to_string(), format!("below the {experts} experts"));
    }
    if removed.len() == experts {
        return refuse("all".into(), "at least one expert left".into());
    }
    router.check_without(experts, removed)
}

/// Why another rule cannot route a layer that routes by a table.
pub(crate) fn by_table(layer: usize) -> String {
    format!("another rule of the routing of layer {layer}, which routes by a table of the vocabulary")
}

/// Refuses experts removed beside a rule.
///
/// # Errors
/// [`Error::Input`] names the layer.
pub(crate) fn check_rule(overlay: &dyn RoutingOverlay, layer: usize) -> Result<()> {
    let removed = overlay.removed(layer).unwrap_or_default();
    if overlay.rule(layer).is_some() && !removed.is_empty() {
        return Err(refusal("experts removed beside a rule", layer, format!("{removed:?}"), "none"));
    }
    Ok(())
}

pub(crate) fn refusal(what: &str, layer: usize, found: impl ToString, expected: impl ToString) -> Error {
    Error::input(format!("{what} of the routing overlay in layer {layer}"), found, expected)
}

/// Takes whole experts out, as pruning them with their rows of the router does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoveExperts {
    removed: BTreeMap<usize, Vec<u32>>,
}

impl RemoveExperts {
    /// Removes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes these experts of a layer, in any order, instead of those given for it before.
    pub fn remove(mut self, layer: usize, experts: impl IntoIterator<Item = u32>) -> Self {
        let mut experts: Vec<u32> = experts.into_iter().collect();
        experts.sort_unstable();
        experts.dedup();
        self.removed.insert(layer, experts);
        self
    }
}

impl RoutingOverlay for RemoveExperts {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        self.removed.get(&layer).filter(|experts| !experts.is_empty()).map(Vec::as_slice)
    }
}

/// Multiplies the routing weights of experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertGains {
    gains: BTreeMap<usize, Vec<f32>>,
}

impl ExpertGains {
    /// Changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the gains `[E]` of a layer.
    pub fn set(mut self, layer: usize, gains: impl Into<Vec<f32>>) -> Self {
        self.gains.insert(layer, gains.into());
        self
    }
}

impl RoutingOverlay for ExpertGains {
    fn gains(&self, layer: usize) -> Option<Vec<f32>> {
        self.gains.get(&layer).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_experts_are_sorted_and_counted_once() {
        let overlay = RemoveExperts::new().remove(1, [3, 0, 3]).remove(2, []);
        assert_eq!(overlay.removed(1), Some(&[0, 3][..]));
        assert_eq!((overlay.removed(0), overlay.removed(2)), (None, None));
    }

    #[test]
    fn a_gradient_passes_a_constant_factor_and_not_a_change_of_expert() {
        struct Nothing;
        impl RoutingOverlay for Nothing {}
        let before = Routed { experts: 4, top_k: 2, selected: vec![0, 1, 2, 3], weights: vec![0.5, 0.25, 0.5, 0.5] };
        let after = Routed { selected: vec![0, 1, 2, 0], weights: vec![1.0, 0.0, 0.5, 0.5], ..before.clone() };
        let mut d = [3.0, 3.0, 3.0, 3.0];
        Nothing.routed_backward(0, &before, &after, &mut d);
        assert_eq!(d, [6.0, 0.0, 3.0, 0.0]);
    }
}
