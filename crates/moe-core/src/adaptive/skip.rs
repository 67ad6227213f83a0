//! Experts that weigh little beside the best one of their token.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{PerLayer, RunTimeRouting};
use crate::{
    Model,
    error::{Error, Result},
    overlay::{SkipCalibration, SkipExperts},
};

/// NAEE's dynamic skipping (arXiv 2402.14800 section 3.3): a token leaves out the experts whose weight is below `beta`
/// times that of its best one. Without `beta`, thresholds come from calibration rows: the median of the smallest weight
/// over the largest, as published, or those that skip a `share` of all experts but the best.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Skip {
    /// Thresholds, 0 or more; 0 skips nothing.
    pub beta: Option<PerLayer<f32>>,
    /// Instead of `beta`: the share of experts, without the best of each token, that calibration rows skip.
    pub share: Option<f64>,
    /// Whether weights that stay are scaled to the sum of all; by default where the model's own weights are divided by
    /// their sum.
    pub renormalize: Option<bool>,
}

impl Skip {
    /// # Errors
    /// [`Error::Input`] for both of `beta` and `share`, and for a number out of range.
    pub fn validate(&self) -> Result<()> {
        if self.beta.is_some() && self.share.is_some() {
            return Err(Error::input("skip", "beta and share", "one of them, or none for the median"));
        }
        match self.share {
            Some(share) if !(0.0..=1.0).contains(&share) => Err(Error::input("share", share, "a number in [0, 1]")),
            _ => Ok(()),
        }
    }

    /// The thresholds of a model's layers.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Input`] for thresholds below 0, and for those that are still to be
    /// found by [`calibrated`](Self::calibrated).
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        self.validate()?;
        let Some(beta) = &self.beta else {
            return Err(Error::input("beta", "none", "thresholds, or rows to calibrate them on"));
        };
        let mut thresholds = BTreeMap::new();
        for (layer, _, beta) in beta.of(model.config(), "beta")? {
            if !(beta >= 0.0 && beta.is_finite()) {
                return Err(Error::input(format!("beta of layer {layer}"), beta, "a finite number of 0 or more"));
            }
            thresholds.insert(layer, beta);
        }
        let renormalize = self.renormalize.unwrap_or_else(|| model.router().renormalizes());
        Ok(RunTimeRouting { skip: Some(SkipExperts { beta: thresholds, renormalize }), ..RunTimeRouting::default() })
    }

    /// The same with thresholds by what `calibration` saw.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and [`Error::Input`] for layers of which it saw nothing.
    pub fn calibrated(&self, model: &Model, calibration: &SkipCalibration) -> Result<Self> {
        self.validate()?;
        if self.beta.is_some() {
            return Ok(self.clone());
        }
        let found = match self.share {
            None => calibration.medians(),
            Some(share) => calibration.skipping(share)?,
        };
        let mut beta = Vec::new();
        for (layer, _, _) in PerLayer::All(()).of(model.config(), "beta")? {
            let missing = || Error::input(format!("layer {layer}"), "no tokens with several experts", "some");
            beta.push(*found.get(&layer).ok_or_else(missing)?);
        }
        Ok(Self { beta: Some(PerLayer::Each(beta)), share: None, renormalize: self.renormalize })
    }
}
