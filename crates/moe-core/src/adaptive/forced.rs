//! Experts by the label of a sequence.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{RunTimeRouting, per_layer::moe_layers};
use crate::{
    Model,
    error::{Error, Result},
    overlay::{RouterTokens, RoutingRule, RuleGradients},
    router::{Combine, Routed},
};

/// Sends all tokens of a sequence to the experts of its label, whatever the router says (Contrastive MoE's first
/// stage). Sequences without a label are routed by the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forced {
    /// The experts of every label, in all layers: label 0 first.
    pub experts: Vec<Vec<u32>>,
    /// The label of sequences that have no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<usize>,
    /// The weights of the forced experts.
    #[serde(default)]
    pub weights: ForcedWeights,
    /// Labels of the sequences of waves, by the wave's id.
    #[serde(skip)]
    pub labels: BTreeMap<u64, Vec<usize>>,
}

/// Weights of experts that a token was forced to go to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForcedWeights {
    /// What the model's rule gives to these experts alone.
    #[default]
    Model,
    /// Their scores over all experts.
    Raw,
    /// Their scores divided by the sum of theirs.
    Renorm,
    /// One over their number, whatever the router says.
    Equal,
}

#[derive(Debug)]
struct ForcedRule(Forced);

impl Forced {
    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] for labels without experts, experts that a layer does not have or that are named twice, and
    /// labels that have no experts; [`Error::Unsupported`] for a model whose rule cannot weigh any experts.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        let layers = moe_layers(model.config())?;
        for (label, experts) in self.experts.iter().enumerate() {
            let least = layers.iter().map(|(_, experts)| *experts).min().unwrap_or(0);
            let twice = experts.iter().enumerate().any(|(i, e)| experts[..i].contains(e));
            if experts.is_empty() || twice || experts.iter().any(|e| *e as usize >= least) {
                let expected = format!("different ones below {least}, at least one");
                return Err(Error::input(format!("experts of label {label}"), format!("{experts:?}"), expected));
            }
        }
        let known = self.labels.values().flatten().copied().chain(self.label);
        if let Some(label) = known.into_iter().find(|label| *label >= self.experts.len()) {
            return Err(Error::input("label", label, format!("below {}, the labels with experts", self.experts.len())));
        }
        // SparseMixer chooses its experts one after the other by their logits, and has no weight for any others
        model.router().with_combine(Combine::Raw)?;
        RunTimeRouting::everywhere(model.config(), ForcedRule(self.clone()))
    }

    /// The experts of every token; `None` for those that the model routes.
    fn of_tokens(&self, tokens: &RouterTokens<'_>) -> Vec<Option<&[u32]>> {
        let labels = self.labels.get(&tokens.wave.id);
        let mut found = vec![None; tokens.tokens()];
        for (sequence, info) in tokens.wave.sequences.iter().enumerate() {
            let label = labels.and_then(|labels| labels.get(sequence)).copied().or(self.label);
            found[info.tokens.clone()].fill(label.map(|label| self.experts[label].as_slice()));
        }
        found
    }

    fn router_combine(&self) -> Combine {
        match self.weights {
            ForcedWeights::Model | ForcedWeights::Equal => Combine::Model,
            ForcedWeights::Raw => Combine::Raw,
            ForcedWeights::Renorm => Combine::Renorm,
        }
    }
}

impl RoutingRule for ForcedRule {
    fn route(&self, tokens: &RouterTokens<'_>) -> Result<Routed> {
        let own = tokens.router.route(tokens.logits, tokens.experts, tokens.bias);
        let forced = self.0.of_tokens(tokens);
        let k = forced.iter().flatten().map(|experts| experts.len()).chain([own.top_k]).max().unwrap_or(own.top_k);
        let mut routed = Routed { experts: tokens.experts, top_k: k, selected: Vec::new(), weights: Vec::new() };
        let mut members = Vec::with_capacity(forced.len() * k);
        for (t, forced) in forced.iter().enumerate() {
            let first = forced.unwrap_or(&own.selected[t * own.top_k..(t + 1) * own.top_k]);
            let rest = (0..tokens.experts as u32).filter(|e| !first.contains(e));
            routed.selected.extend(first.iter().copied().chain(rest).take(k));
            members.extend((0..k).map(|slot| slot < first.len()));
        }
        routed.weights = vec![0.0; routed.selected.len()];
        let router = tokens.router.with_combine(self.0.router_combine())?;
        router.weigh_members(tokens.logits, &mut routed, |slot| members[slot]);
        for (t, forced) in forced.iter().enumerate() {
            let weights = &mut routed.weights[t * k..(t + 1) * k];
            match (forced, self.0.weights) {
                (None, _) => weights[..own.top_k].copy_from_slice(&own.weights[t * own.top_k..(t + 1) * own.top_k]),
                (Some(forced), ForcedWeights::Equal) => weights[..forced.len()].fill(1.0 / forced.len() as f32),
                _ => {}
            }
        }
        Ok(routed)
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> Result<RuleGradients> {
        let forced = self.0.of_tokens(tokens);
        let k = routed.top_k;
        let by = |is_forced: bool| -> Routed {
            let mut part = routed.clone();
            for (t, forced) in forced.iter().enumerate().filter(|(_, forced)| forced.is_some() != is_forced) {
                debug_assert!(forced.is_some() != is_forced);
                part.weights[t * k..(t + 1) * k].fill(0.0);
            }
            part
        };
        let mut logits = tokens.router.members_backward(tokens.logits, &by(false), d_weights);
        if self.0.weights != ForcedWeights::Equal {
            let router = tokens.router.with_combine(self.0.router_combine())?;
            let through = router.members_backward(tokens.logits, &by(true), d_weights);
            logits.iter_mut().zip(through).for_each(|(sum, d)| *sum += d);
        }
        Ok(logits.into())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn rule(forced: Forced) -> impl RoutingRule {
        ForcedRule(forced)
    }
}
