//! A short adaptation of a model to null experts.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{NullExpertOptions, NullExperts};
use crate::{
    AdapterSet, Artifacts, Error, Installed, Phase, Result, Setting, TuningMethod, lora::LoraConfig,
    model_weights::OwnWeights,
};

/// Trains null experts into a model, with some of its own weights: half of the steps under a tight balance, half under
/// a loose one (AdaMoE, arXiv 2406.13233).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NullExpertTuning {
    /// How many there are, and how tokens go to them.
    pub experts: NullExpertOptions,
    /// Coefficient of the balance loss in the first half.
    pub balance: f64,
    /// And in the second.
    pub last_balance: f64,
    /// The model's own weights that are trained as well.
    pub weights: OwnWeights,
    /// Low-rank additions that are trained as well, as the paper's adaptation of a large model has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Box<LoraConfig>>,
}

impl Default for NullExpertTuning {
    fn default() -> Self {
        Self {
            experts: NullExpertOptions::default(),
            balance: 0.02,
            last_balance: 1e-4,
            weights: OwnWeights { router: true, ..OwnWeights::default() },
            lora: None,
        }
    }
}

impl NullExpertTuning {
    fn has_weights(&self) -> bool {
        self.weights != OwnWeights::default()
    }
}

impl TuningMethod for NullExpertTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        for (field, value) in [("balance", self.balance), ("last_balance", self.last_balance)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::input(field, value, "a finite number of 0 or more"));
            }
        }
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("null experts on a model whose routing is changed already".into()));
        }
        NullExperts::new(on.model, &self.experts)?;
        if let Some(lora) = &self.lora {
            lora.check(on)?;
        }
        if self.has_weights() { self.weights.check(on) } else { Ok(()) }
    }

    fn phases(&self, steps: usize) -> Vec<Phase> {
        let first = (steps / 2).max(1);
        vec![Phase { name: "tight", steps: first }, Phase { name: "loose", steps: steps.saturating_sub(first).max(1) }]
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let mut installed = match self.has_weights() {
            true => self.weights.install(on, set)?,
            false => Installed::default(),
        };
        if let Some(lora) = &self.lora {
            installed = installed.and(lora.install(on, set)?);
        }
        let before = on.take_before();
        let nulls = match &before {
            None => Arc::new(NullExperts::new(on.model, &self.experts)?),
            Some(before) => {
                let nulls = before.artifacts.null_experts.clone();
                nulls.ok_or_else(|| Error::input("the phase before", "another", "that of null experts"))?
            }
        };
        nulls.train_in(set)?;
        nulls.set_balance(if before.is_none() { self.balance } else { self.last_balance });
        if let Some(before) = before {
            set.bank().settle(before.parameters)?;
        }
        let model = Some(nulls.applied_to(on.model)?);
        let artifacts = Artifacts { null_experts: Some(nulls), ..installed.artifacts.clone() };
        Ok(Installed { model, artifacts, ..installed })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        if self.has_weights() {
            self.weights.outline(on, set)?;
        }
        let lora = match &self.lora {
            Some(lora) => lora.outline(on, set)?,
            None => Installed::default(),
        };
        NullExperts::new(on.model, &self.experts)?.train_in(set)?;
        Ok(lora)
    }
}
