//! As few experts as hold a share of the probability mass.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{PerLayer, RunTimeRouting, members::Members};
use crate::{
    Model,
    error::{Error, Result},
    overlay::RouterTokens,
    router::{Combine, Routed, Router},
    trace::{LayerTrace, Observer, Signals},
};

/// Dynamic top-p routing: a token goes to its best experts until their shares exceed `tau`, the one that crosses it
/// included (arXiv 2403.07652; the comparison is strict, as in its code, and where it never holds all experts stay).
///
/// On a trained model, the mass of the model's own top k is the safe one: it adds no experts. With the mass of all
/// experts a flat router sends tokens to very many, which [`max_k`](Self::max_k) bounds. The paper's weights are
/// [`Combine::Raw`], which a model that renormalizes was not trained with; by default the model's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopP {
    /// Share of the mass that has to be exceeded, in [0, 1]: at 1 all experts stay.
    pub tau: Option<PerLayer<f64>>,
    /// Instead of `tau`: experts per token that calibration rows have on average, in every layer.
    pub experts: Option<f64>,
    /// Experts per token, at least.
    pub min_k: usize,
    /// Experts per token, at most.
    pub max_k: Option<usize>,
    /// What the share is of.
    pub mass: Mass,
    /// How the weights follow from the scores.
    pub combine: Combine,
}

/// What a share of the mass is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mass {
    /// The scores of the experts that the model's own rule selects, divided by their sum.
    #[default]
    TrainedTopK,
    /// The scores of all experts, as published.
    AllExperts,
}

impl Default for TopP {
    fn default() -> Self {
        Self { tau: None, experts: None, min_k: 1, max_k: None, mass: Mass::TrainedTopK, combine: Combine::Model }
    }
}

/// The rule of one layer.
#[derive(Debug)]
struct PRule {
    tau: f64,
    min_k: usize,
    limit: usize,
    combine: Combine,
    mass: Mass,
}

/// The experts of tokens in the order in which they are taken, `limit` each.
fn ordered(router: &Router, tokens: &RouterTokens<'_>, limit: usize) -> Routed {
    router.with_top_k(limit).route(tokens.logits, tokens.experts, tokens.bias)
}

/// How much mass the first `limit` experts of tokens hold, `[T, limit]`, of `selected [T, k]` in their order.
fn masses(router: &Router, logits: &[f32], experts: usize, (selected, k): (&[u32], usize), of: Of) -> Vec<f64> {
    let (mut held, mut shares) = (Vec::with_capacity(selected.len()), Vec::new());
    for (logits, selected) in logits.chunks_exact(experts).zip(selected.chunks_exact(k)) {
        router.shares(logits, &mut shares);
        let share = |e: &u32| shares[*e as usize];
        let whole: f64 = of.own.map_or(1.0, |own| selected.iter().take(own).map(share).sum());
        let mut sum = 0.0;
        held.extend(selected.iter().take(of.limit).map(|e| {
            sum += share(e) / whole;
            sum
        }));
    }
    held
}

/// What a share is of.
#[derive(Clone, Copy)]
struct Of {
    /// Experts that are taken at most.
    limit: usize,
    /// Experts whose mass is the whole; all of them without.
    own: Option<usize>,
}

/// How many experts of a token are taken, given what the first ones hold.
fn taken(held: &[f64], tau: f64, min_k: usize) -> usize {
    let crossing = if tau >= 1.0 { None } else { held.iter().position(|held| *held > tau) };
    crossing.map_or(held.len(), |at| at + 1).max(min_k).min(held.len())
}

impl Members for PRule {
    fn combine(&self) -> Combine {
        self.combine
    }

    fn choose(&self, tokens: &RouterTokens<'_>, router: &Router) -> Result<Routed> {
        let limit = self.limit;
        let own = (self.mass == Mass::TrainedTopK).then(|| router.top_k().min(tokens.experts));
        // the whole is that of the model's own experts, though fewer may be taken
        let mut routed = ordered(router, tokens, own.unwrap_or(limit).max(limit));
        let k = routed.top_k;
        let held = masses(router, tokens.logits, tokens.experts, (&routed.selected, k), Of { limit, own });
        let taken: Vec<usize> = held.chunks_exact(limit).map(|held| taken(held, self.tau, self.min_k)).collect();
        router.weigh_members(tokens.logits, &mut routed, |slot| slot % k < taken[slot / k]);
        Ok(routed)
    }
}

impl TopP {
    /// Experts per token at most, in a layer of so many.
    fn limit(&self, router: &Router, experts: usize) -> usize {
        let most = match self.mass {
            Mass::TrainedTopK => router.top_k().min(experts),
            Mass::AllExperts => router.reachable(experts),
        };
        self.max_k.map_or(most, |max| max.min(most))
    }

    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if self.tau.is_some() == self.experts.is_some() {
            return Err(Error::input("top_p", "not one of tau and experts", "a tau, or experts per token on average"));
        }
        if self.min_k == 0 || self.max_k.is_some_and(|max| max < self.min_k) {
            let found = format!("{} to {:?}", self.min_k, self.max_k);
            return Err(Error::input("min_k to max_k", found, "at least 1, and no more than max_k"));
        }
        Ok(())
    }

    /// The rules of a model's layers.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Input`] for a `tau` outside [0, 1], and for one that is still to be
    /// found by [`calibrated`](Self::calibrated).
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        self.validate()?;
        let router = model.router().with_combine(self.combine)?;
        let Some(tau) = &self.tau else {
            return Err(Error::input("tau", "experts per token on average", "a share: rows to calibrate it on"));
        };
        RunTimeRouting::by_layer(tau.of(model.config(), "tau")?, |layer, experts, tau| {
            if !(0.0..=1.0).contains(&tau) {
                return Err(Error::input(format!("tau of layer {layer}"), tau, "a share in [0, 1]"));
            }
            let limit = self.limit(&router, experts);
            let Self { min_k, combine, mass, .. } = *self;
            Ok(PRule { tau, min_k: min_k.min(limit), limit, combine, mass })
        })
    }

    /// The same with a `tau` for every layer that gives the tokens seen by `calibration` the mean number of experts
    /// asked for, or as few more as `min_k` allows.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and [`Error::Input`] for a mean that no `tau` gives.
    pub fn calibrated(&self, calibration: &TopPCalibration) -> Result<Self> {
        self.validate()?;
        let Some(mean) = self.experts else { return Ok(self.clone()) };
        let mut taus = Vec::new();
        for (layer, (limit, held)) in &calibration.layers {
            if !(mean >= self.min_k as f64 && mean <= *limit as f64) {
                let expected = format!("{} to {limit} in layer {layer}", self.min_k);
                return Err(Error::input("experts", mean, expected));
            }
            let tokens = held.len() / limit;
            let count = |tau: f64| -> f64 {
                held.chunks_exact(*limit).map(|held| taken(held, tau, self.min_k)).sum::<usize>() as f64
            };
            // the mean grows with tau, in steps
            let (mut low, mut high) = (0.0, 1.0);
            if count(high) > mean * tokens as f64 {
                for _ in 0..60 {
                    let middle = (low + high) / 2.0;
                    if count(middle) > mean * tokens as f64 { high = middle } else { low = middle }
                }
                high = low;
            }
            taus.push(high);
        }
        Ok(Self { tau: Some(PerLayer::Each(taus)), experts: None, ..self.clone() })
    }

    /// Has seen nothing yet of what [`calibrated`](Self::calibrated) needs of a model.
    ///
    /// # Errors
    /// Those of reading the model, and [`Error::Unsupported`] for weights that its rule cannot give.
    pub fn calibration(&self, model: &Model) -> Result<TopPCalibration> {
        let router = model.router().with_combine(self.combine)?;
        let mut biases = BTreeMap::new();
        for (layer, _) in super::per_layer::moe_layers(model.config())? {
            if model.config().moe(layer).is_some_and(|moe| moe.by_table) {
                return Err(Error::Unsupported(crate::overlay::routing::by_table(layer)));
            }
            let bias = model.ffn(layer)?.router.and_then(|router| router.selection_bias);
            biases.extend(bias.map(|bias| (layer, bias)));
        }
        Ok(TopPCalibration { rule: self.clone(), router, biases, layers: BTreeMap::new() })
    }
}

/// Collects how much mass the best experts of tokens hold: `8 k` bytes per token and layer.
#[derive(Clone, Debug)]
pub struct TopPCalibration {
    rule: TopP,
    router: Router,
    biases: BTreeMap<usize, Arc<[f32]>>,
    layers: BTreeMap<usize, (usize, Vec<f64>)>,
}

impl Observer for TopPCalibration {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let tokens = RouterTokens {
            layer: trace.layer,
            experts: trace.experts,
            logits: trace.logits,
            bias: self.biases.get(&trace.layer).map(|bias| &**bias),
            input: None,
            router: &self.router,
            table: None,
            wave: trace.wave,
        };
        let limit = self.rule.limit(&self.router, trace.experts);
        let held = match self.rule.mass {
            Mass::TrainedTopK => {
                let of = Of { limit, own: Some(trace.top_k) };
                masses(&self.router, trace.logits, trace.experts, (trace.selected, trace.top_k), of)
            }
            Mass::AllExperts => {
                let order = ordered(&self.router, &tokens, limit);
                let of = Of { limit, own: None };
                masses(&self.router, trace.logits, trace.experts, (&order.selected, limit), of)
            }
        };
        let layer = self.layers.entry(trace.layer).or_insert((limit, Vec::new()));
        layer.1.extend(held);
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::overlay::RoutingRule;

    pub fn rule(tau: f64, min_k: usize, limit: usize, mass: Mass) -> impl RoutingRule {
        PRule { tau, min_k, limit, combine: Combine::Model, mass }
    }
}
