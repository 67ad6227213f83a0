//! Experts that choose tokens.

use serde::{Deserialize, Serialize};

use super::{CapacityGroup, RunTimeRouting, members::Members};
use crate::{
    Model,
    error::{Error, Result},
    overlay::RouterTokens,
    router::{Combine, Routed, Router},
};

/// Expert choice routing (arXiv 2202.09368, as in flaxformer): every expert takes its `round(factor T / E)` tokens with
/// the largest scores, and weighs them by the score as it is. A token has `factor` experts on average, and may have
/// none or all.
///
/// Which experts a token has depends on the tokens after it, so that a decoder under it looks into the future: it has
/// to be [asked for](Self::acausal) by name, generation refuses it all the same, and figures are not comparable with
/// those of a causal model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertChoice {
    /// Experts per token on average, above 0.
    pub factor: f64,
    /// Tokens that an expert chooses among.
    #[serde(default)]
    pub group: CapacityGroup,
    /// That decoders see later tokens is meant.
    #[serde(default)]
    pub acausal: bool,
}

#[derive(Debug)]
struct ChoiceRule(ExpertChoice);

impl ExpertChoice {
    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] for a factor out of range and without [`acausal`](Self::acausal); [`Error::Unsupported`] for a
    /// model whose rule has no raw scores.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        if !(self.factor > 0.0 && self.factor.is_finite()) {
            return Err(Error::input("factor", self.factor, "a finite number above 0"));
        }
        if !self.acausal {
            let expected = "`acausal`: true, since a decoder in which experts choose tokens sees later tokens";
            return Err(Error::input("expert_choice", "a decoder", expected));
        }
        model.router().with_combine(Combine::Raw)?;
        RunTimeRouting::everywhere(model.config(), ChoiceRule(self.clone()))
    }
}

impl Members for ChoiceRule {
    fn combine(&self) -> Combine {
        Combine::Raw
    }

    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed> {
        let (experts, count) = (tokens.experts, tokens.tokens());
        let mut shares = Vec::new();
        let mut scores = Vec::with_capacity(tokens.logits.len());
        for logits in tokens.logits.chunks_exact(experts) {
            router.shares(logits, &mut shares);
            scores.extend_from_slice(&shares);
        }
        let mut chosen = vec![false; tokens.logits.len()];
        for rows in self.0.group.rows(tokens) {
            let capacity = ((self.0.factor * rows.len() as f64 / experts as f64).round() as usize).min(rows.len());
            for e in 0..experts {
                let mut order: Vec<usize> = rows.clone().collect();
                order.sort_by(|a, b| scores[b * experts + e].total_cmp(&scores[a * experts + e]));
                order[..capacity].iter().for_each(|t| chosen[t * experts + e] = true);
            }
        }
        // all experts in a fixed order, those that chose the token first
        let mut selected = Vec::with_capacity(tokens.logits.len());
        for t in 0..count {
            let of = |e: usize| (chosen[t * experts + e], scores[t * experts + e]);
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| of(b).0.cmp(&of(a).0).then(of(b).1.total_cmp(&of(a).1)));
            selected.extend(order.into_iter().map(|e| e as u32));
        }
        let weights = vec![0.0; selected.len()];
        let mut routed = Routed { experts, top_k: experts, selected, weights };
        let members: Vec<bool> = routed
            .selected
            .iter()
            .enumerate()
            .map(|(slot, &e)| chosen[slot / experts * experts + e as usize])
            .collect();
        router.weigh_members(tokens.logits, &mut routed, |slot| members[slot]);
        Ok(routed)
    }

    fn looks_back_only(&self) -> bool {
        false
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::overlay::RoutingRule;

    pub fn rule(choice: ExpertChoice) -> impl RoutingRule {
        ChoiceRule(choice)
    }
}
