//! Experts below a logit.

use serde::{Deserialize, Serialize};

use super::{PerLayer, RunTimeRouting, members::Members};
use crate::{
    Model,
    error::{Error, Result},
    overlay::RouterTokens,
    router::{Routed, Router},
};

/// Of the experts that the model selects for a token, those stay whose logit is at least `logit`: what top-k would do
/// beside `nulls` null experts (AdaMoE, arXiv 2406.13233) whose logits are constant, with ties to the true experts. All
/// but `nulls` of the best stay in any case. A token all of whose experts go passes the layer unchanged.
///
/// The weights of those that stay are what the model's rule gives them alone. An elementary consequence of AdaMoE, not
/// a published method: it needs no training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    /// The logit of the null experts.
    pub logit: PerLayer<f32>,
    /// Their number; as many as the experts of a token by default, 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nulls: Option<usize>,
}

/// The rule of one layer.
#[derive(Debug)]
struct ThresholdRule {
    logit: f32,
    nulls: Option<usize>,
}

impl Threshold {
    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] for a logit that is not a number.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        RunTimeRouting::by_layer(self.logit.of(model.config(), "logit")?, |layer, _, logit| match logit.is_nan() {
            true => Err(Error::input(format!("logit of layer {layer}"), logit, "a number")),
            false => Ok(ThresholdRule { logit, nulls: self.nulls }),
        })
    }
}

impl Members for ThresholdRule {
    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed> {
        let mut routed = router.route(tokens.logits, tokens.experts, tokens.bias);
        let k = routed.top_k.max(1);
        let kept = k.saturating_sub(self.nulls.unwrap_or(k));
        let mut stays = Vec::with_capacity(routed.selected.len());
        for (logits, selected) in tokens.logits.chunks_exact(tokens.experts).zip(routed.selected.chunks_exact(k)) {
            let logit = |slot: usize| logits[selected[slot] as usize];
            let before = |o: usize, slot: usize| logit(o) > logit(slot) || (logit(o) == logit(slot) && o < slot);
            let rank = |slot: usize| (0..k).filter(|o| before(*o, slot)).count();
            stays.extend((0..k).map(|slot| logit(slot) >= self.logit || rank(slot) < kept));
        }
        router.weigh_members(tokens.logits, &mut routed, |slot| stays[slot]);
        Ok(routed)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::overlay::RoutingRule;

    pub fn rule(logit: f32, nulls: Option<usize>) -> impl RoutingRule {
        ThresholdRule { logit, nulls }
    }
}
