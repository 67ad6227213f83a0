//! Training a recurrent router.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{RecurrentOptions, RecurrentRouter};
use crate::{AdapterSet, Artifacts, Error, Installed, Result, Setting, TuningMethod, model_weights::OwnWeights};

/// Trains a recurrent router beside a model; the model's own weights stay frozen, unless some are named.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecurrentRouterTuning {
    /// Its size and form.
    pub router: RecurrentOptions,
    /// The model's own weights that are trained as well.
    pub weights: OwnWeights,
}

impl RecurrentRouterTuning {
    fn has_weights(&self) -> bool {
        self.weights != OwnWeights::default()
    }
}

impl TuningMethod for RecurrentRouterTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("a recurrent router on a model whose routing is changed already".into()));
        }
        RecurrentRouter::new(on.model, self.router)?;
        if self.has_weights() { self.weights.check(on) } else { Ok(()) }
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        let installed = match self.has_weights() {
            true => self.weights.install(on, set)?,
            false => Installed::default(),
        };
        let router = Arc::new(RecurrentRouter::new(on.model, self.router)?);
        router.train_in(set)?;
        let model = Some(router.applied_to(on.model)?);
        let artifacts = Artifacts { recurrent_router: Some(router), ..installed.artifacts.clone() };
        Ok(Installed { model, artifacts, ..installed })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        if self.has_weights() {
            self.weights.outline(on, set)?;
        }
        RecurrentRouter::new(on.model, self.router)?.train_in(set)?;
        Ok(Installed::default())
    }
}
