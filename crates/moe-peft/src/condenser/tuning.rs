//! Both phases of condenser experts as one method.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{CondenserCounts, CondenserOptions, Condensers, Starved};
use crate::{AdapterSet, Artifacts, Error, Installed, Phase, Result, Setting, TuningMethod, model_weights::OwnWeights};

/// Fine-tuning with condenser experts: a first phase that learns biases, the choice of condensers, and a second phase
/// with them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CondenserTuning {
    /// How the bias moves in the first phase, and how condensers run.
    pub options: CondenserOptions,
    /// How many condensers each layer has.
    pub counts: CondenserCounts,
    /// Which end of the biases becomes condensers.
    pub starved: Starved,
    /// Speed of the bias in the second phase; the code takes 5e-5.
    pub second_speed: f32,
    /// Share of the steps that is the first phase, in (0, 1). Ours: the sources do not say.
    pub first_share: f64,
    /// The weights that are trained in both.
    pub weights: OwnWeights,
}

impl Default for CondenserTuning {
    fn default() -> Self {
        Self {
            options: CondenserOptions::default(),
            counts: CondenserCounts::default(),
            starved: Starved::Lowest,
            second_speed: 5e-5,
            first_share: 0.5,
            weights: OwnWeights { experts: true, router: true, ..OwnWeights::default() },
        }
    }
}

impl TuningMethod for CondenserTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if !(self.first_share > 0.0 && self.first_share < 1.0) {
            return Err(Error::input("first_share", self.first_share, "a number between 0 and 1"));
        }
        CondenserOptions { speed: self.second_speed, ..self.options }
            .validate()
            .map_err(|_| Error::input("second_speed", self.second_speed, "a finite number of 0 or more"))?;
        let condensers = Condensers::new(on.model.config(), self.options)?;
        condensers.check_counts(&self.counts)?;
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("condenser experts on a model whose routing is changed already".into()));
        }
        self.weights.check(on)
    }

    fn phases(&self, steps: usize) -> Vec<Phase> {
        let first = ((steps as f64 * self.first_share).round() as usize).clamp(1, steps.saturating_sub(1).max(1));
        let second = steps.saturating_sub(first).max(1);
        vec![Phase { name: "bias", steps: first }, Phase { name: "condensers", steps: second }]
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        self.weights.outline(on, set)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let installed = self.weights.install(on, set)?;
        let condensers = match on.take_before() {
            None => Arc::new(Condensers::new(on.model.config(), self.options)?),
            Some(before) => {
                let condensers = before.artifacts.condensers;
                let condensers = condensers
                    .ok_or_else(|| Error::input("the phase before condensers", "another", "that of biases"))?;
                condensers.select(&self.counts, self.starved)?;
                condensers.set_speed(self.second_speed)?;
                set.bank().settle(before.parameters)?;
                condensers
            }
        };
        condensers.count_in(set);
        let model = Some(condensers.applied_to(on.model)?);
        let artifacts = Artifacts { condensers: Some(condensers.clone()), ..Artifacts::default() };
        Ok(Installed { model, hooks: Some(Box::new(condensers)), artifacts, ..installed })
    }
}
