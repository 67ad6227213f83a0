//! Experts by their rank.

use serde::{Deserialize, Serialize};

use super::{RunTimeRouting, members::Members, per_layer::moe_layers};
use crate::{
    Model,
    error::{Error, Result},
    overlay::RouterTokens,
    router::{Combine, Routed, Router},
};

/// Sends every token to the experts at these places of its order of preference, counted from 0: `[2]` is the third
/// best, `[0, .., k - 1]` the model's own choice. SCMoE's weak routing (arXiv 2405.14507), whose code divides the
/// weights by their sum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ranks {
    /// The places, each once.
    pub ranks: Vec<usize>,
    /// How the weights follow from the scores.
    #[serde(default)]
    pub combine: Combine,
}

#[derive(Debug)]
struct RankRule(Ranks);

impl Ranks {
    /// The rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`] for no place, one named twice or past the experts that a token can reach;
    /// [`Error::Unsupported`] for weights that the model's rule cannot give.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        model.router().with_combine(self.combine)?;
        let layers = moe_layers(model.config())?;
        let twice = self.ranks.iter().enumerate().any(|(i, rank)| self.ranks[..i].contains(rank));
        for (layer, experts) in &layers {
            let most = model.router().reachable(*experts);
            if self.ranks.is_empty() || twice || self.ranks.iter().any(|rank| *rank >= most) {
                let expected = format!("different ones below {most}, at least one");
                return Err(Error::input(format!("ranks in layer {layer}"), format!("{:?}", self.ranks), expected));
            }
        }
        RunTimeRouting::everywhere(model.config(), RankRule(self.clone()))
    }
}

impl Members for RankRule {
    fn combine(&self) -> Combine {
        self.0.combine
    }

    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed> {
        let ranks = &self.0.ranks;
        let depth = ranks.iter().max().map_or(1, |rank| rank + 1);
        let order = router.with_top_k(depth).route(tokens.logits, tokens.experts, tokens.bias);
        let selected: Vec<u32> =
            order.selected.chunks_exact(depth).flat_map(|order| ranks.iter().map(|rank| order[*rank])).collect();
        let weights = vec![0.0; selected.len()];
        let mut routed = Routed { experts: tokens.experts, top_k: ranks.len(), selected, weights };
        router.weigh_members(tokens.logits, &mut routed, |_| true);
        Ok(routed)
    }
}
