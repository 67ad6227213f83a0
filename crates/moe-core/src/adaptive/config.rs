//! All rules as one tagged value.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use moe_checkpoint::{LayerRole, Role, RoutingExport};
use serde::{Deserialize, Serialize};

use super::{
    Capacity, ExpertChoice, Forced, Intervention, PerLayer, RandomRouter, Ranks, RunTimeRouting, SelectionBias, Shift,
    Skip, Threshold, TopK, TopKCost, TopKSearch, TopP,
};
use crate::{
    Engine, EngineOptions, Model,
    data::Wave,
    error::{Error, Result},
    overlay::SkipCalibration,
    router::Combine,
};

/// How tokens are routed at run time, in JSON `{"type": "top_k", "k": 2}`: see the table in [the module](super).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RoutingConfig {
    /// Another number of experts per token.
    TopK(TopK),
    /// A number of experts per token for every layer.
    TopKSearch(TopKSearch),
    /// The experts at these places of a token's order.
    Ranks(Ranks),
    /// As few experts as hold a share of the mass.
    TopP(TopP),
    /// Experts that weigh little beside the best are skipped.
    Skip(Skip),
    /// Experts below a logit are left out.
    Threshold(Threshold),
    /// Experts take so many tokens and drop the rest.
    Capacity(Capacity),
    /// Experts choose tokens.
    ExpertChoice(ExpertChoice),
    /// Experts by the label of a sequence.
    Forced(Forced),
    /// A bias on the choice.
    Bias(SelectionBias),
    /// Vectors on the logits.
    Shift(Shift),
    /// Steering toward experts.
    Intervene(Intervention),
    /// Random routers.
    Random(RandomRouter),
}

impl RoutingConfig {
    /// Whether its numbers are found on calibration rows ([`calibrated`](Self::calibrated)).
    pub fn needs_rows(&self) -> bool {
        match self {
            Self::Skip(skip) => skip.beta.is_none(),
            Self::TopP(top_p) => top_p.experts.is_some(),
            Self::TopKSearch(search) => search.cost != TopKCost::Random,
            _ => false,
        }
    }

    /// Whether it says every number itself, so that there is nothing to find.
    pub fn is_settled(&self) -> bool {
        !self.needs_rows() && !matches!(self, Self::TopKSearch(_))
    }

    /// The same with every number said, found on `waves` where it was not.
    ///
    /// # Errors
    /// Numbers out of range, and whatever stops the model.
    pub fn calibrated(&self, model: &Model, waves: &[Wave]) -> Result<Self> {
        if self.is_settled() {
            return Ok(self.clone());
        }
        if waves.is_empty() && self.needs_rows() {
            return Err(Error::input("waves to calibrate routing on", 0, "at least one"));
        }
        let engine = Engine::new(model, EngineOptions::default());
        match self {
            Self::Skip(skip) => {
                skip.validate()?;
                let mut seen = SkipCalibration::new();
                waves.iter().try_for_each(|wave| engine.run(wave, &mut seen).map(drop))?;
                Ok(Self::Skip(skip.calibrated(model, &seen)?))
            }
            Self::TopP(top_p) => {
                top_p.validate()?;
                let mut seen = top_p.calibration(model)?;
                waves.iter().try_for_each(|wave| engine.run(wave, &mut seen).map(drop))?;
                Ok(Self::TopP(top_p.calibrated(&seen)?))
            }
            Self::TopKSearch(search) => Ok(Self::TopK(search.calibrated(model, waves)?)),
            _ => Ok(self.clone()),
        }
    }

    /// What it makes of a model's routing.
    ///
    /// # Errors
    /// Names the field that does not fit the model, found and expected.
    pub fn routing(&self, model: &Model) -> Result<RunTimeRouting> {
        match self {
            Self::TopK(rule) => rule.on(model),
            Self::TopKSearch(search) if self.needs_rows() => {
                Err(Error::input("top_k_search", format!("{:?}", search.cost), "numbers that were found on rows"))
            }
            Self::TopKSearch(search) => search.calibrated(model, &[])?.on(model),
            Self::Ranks(rule) => rule.on(model),
            Self::TopP(rule) => rule.on(model),
            Self::Skip(rule) => rule.on(model),
            Self::Threshold(rule) => rule.on(model),
            Self::Capacity(rule) => rule.on(model),
            Self::ExpertChoice(rule) => rule.on(model),
            Self::Forced(rule) => rule.on(model),
            Self::Bias(rule) => rule.on(model),
            Self::Shift(rule) => rule.on(model),
            Self::Intervene(rule) => rule.on(model),
            Self::Random(rule) => rule.on(model),
        }
    }

    /// The model under the rule, on top of whatever overlays and adapters it has.
    ///
    /// # Errors
    /// As [`routing`](Self::routing), and for a model that has another rule in the same layer.
    pub fn on(&self, model: &Model) -> Result<Model> {
        model.routed_by(Arc::new(self.routing(model)?))
    }

    /// What of the rule stock loaders can read: the same number of experts in all layers, weighed as the model weighs
    /// them, and a bias on the selection in a model that has a tensor for it. `None` for every other rule, which stays
    /// [beside](super::RunTime::save_beside) the model.
    ///
    /// # Errors
    /// Those of reading the model's own bias.
    pub fn export(&self, model: &Model) -> Result<Option<RoutingExport>> {
        let export = RoutingExport::default();
        Ok(match self {
            Self::TopK(TopK { k, combine: Combine::Model }) => {
                let of_layers = k.of(model.config(), "k")?;
                let first = of_layers.first().map(|(_, _, k)| *k);
                let same = of_layers.iter().all(|(_, _, k)| Some(*k) == first);
                // a layer with fewer experts than the config says takes them all, as it did before
                same.then_some(RoutingExport { top_k: first, ..export })
            }
            Self::Bias(SelectionBias { bias }) if model.config().routing.correction_bias() => {
                let mut selection_bias = BTreeMap::new();
                let indices = PerLayer::Each((0..bias.len()).collect::<Vec<usize>>());
                for (layer, _, index) in indices.of(model.config(), "bias")? {
                    let own = model.checkpoint().read_f32(Role::Layer(layer, LayerRole::CorrectionBias))?;
                    // Identity experts keep theirs.
                    let more = bias[index].iter().copied().chain(std::iter::repeat(0.0));
                    selection_bias.insert(layer, own.iter().zip(more).map(|(own, more)| own + more).collect());
                }
                Some(RoutingExport { selection_bias, ..export })
            }
            _ => None,
        })
    }
}

impl FromStr for RoutingConfig {
    type Err = Error;

    /// Reads JSON, or the name of a rule that needs no parameters.
    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let read = match text.starts_with('{') {
            true => serde_json::from_str(text),
            false => serde_json::from_value(serde_json::json!({ "type": text })),
        };
        read.map_err(|error| Error::input("routing rule", format!("`{text}`: {error}"), "a name or JSON with its type"))
    }
}
