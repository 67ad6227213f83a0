//! Experts by the label of a row: the first stage of Contrastive MoE.
//!
//! Every row has a label, its task or its kind of question, and its tokens go to the experts of the label whatever the
//! router says, so that copies of one expert (`moe upcycle --method copy`) become different ones. In the stage after it
//! routers learn to send tokens there by themselves, with any method that trains routers.

use moe_core::adaptive::{Forced, ForcedWeights};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Installed, Result, Setting, TuningMethod, model_weights::OwnWeights};

/// Trains experts on the rows of their labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LabelExperts {
    /// The experts of every label, label 0 first; the experts in equal parts by default.
    pub experts: Option<Vec<Vec<u32>>>,
    /// The weights of the experts of a label.
    pub routing: ForcedWeights,
    /// The weights that are trained.
    pub weights: OwnWeights,
}

impl Default for LabelExperts {
    fn default() -> Self {
        let weights = OwnWeights { experts: true, ..OwnWeights::default() };
        Self { experts: None, routing: ForcedWeights::default(), weights }
    }
}

impl LabelExperts {
    fn forced(&self, on: &Setting<'_>) -> Result<Forced> {
        if on.labels.is_empty() {
            return Err(Error::input("labels of rows", "none", "one for each row, that of its task or kind"));
        }
        let labels = on.labels.values().flatten().max().map_or(0, |label| label + 1);
        let config = on.model.config();
        let least = (0..config.layers.len()).filter_map(|layer| config.moe(layer)).map(|moe| moe.num_experts()).min();
        let least = least.unwrap_or(0);
        let experts = match &self.experts {
            Some(experts) => experts.clone(),
            None if labels <= least => {
                let part = |label: usize| (label * least / labels) as u32..((label + 1) * least / labels) as u32;
                (0..labels).map(|label| part(label).collect()).collect()
            }
            None => {
                let expected = format!("at most {least}, one for each expert, or `experts` that says theirs");
                return Err(Error::input("labels of rows", labels, expected));
            }
        };
        Ok(Forced { experts, label: None, weights: self.routing, labels: on.labels.clone() })
    }
}

impl TuningMethod for LabelExperts {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("experts by label on a model whose routing is changed already".into()));
        }
        self.forced(on)?.on(on.model)?;
        self.weights.check(on)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let installed = self.weights.install(on, set)?;
        let model = Some(on.model.routed_by(std::sync::Arc::new(self.forced(on)?.on(on.model)?))?);
        Ok(Installed { model, ..installed })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        self.weights.outline(on, set)
    }
}
