//! Everything that a model does at run time, as one value and one file beside the model.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::RoutingConfig;
use crate::{
    Model,
    data::Wave,
    decode::DecodingConfig,
    depth::DepthConfig,
    error::{Error, Result},
};

/// How a model is run: its routing, the layers that tokens go through, how the next token is found, and its norms.
/// Nothing changes by default.
///
/// ```
/// use moe_core::adaptive::RunTime;
///
/// let json = r#"{"routing": {"type": "top_p", "tau": 0.8}, "layers": "0-2,3a"}"#;
/// let run_time: RunTime = serde_json::from_str(json)?;
/// assert!(!run_time.is_plain() && RunTime::default().is_plain());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunTime {
    /// How tokens are routed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingConfig>,
    /// The layers that tokens go through: a path such as `0-3,5,5,6a`, or a rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<DepthConfig>,
    /// How the next token is found, in a way that needs no other model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoding: Option<DecodingConfig>,
    /// Whether LayerNorms run as RMSNorms ([`Model::with_folded_norms`]).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fold_norms: bool,
}

impl RunTime {
    /// Name of the file beside a model.
    pub const FILE: &str = "run_time.json";

    /// Whether nothing changes.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Whether numbers of it are found on calibration rows.
    pub fn needs_rows(&self) -> bool {
        self.routing.as_ref().is_some_and(RoutingConfig::needs_rows)
            || self.layers.as_ref().is_some_and(DepthConfig::needs_rows)
            || self.decoding.as_ref().is_some_and(DecodingConfig::needs_rows)
    }

    /// Whether these rows need prompts and answers, with a loss over the answers alone.
    pub fn needs_answers(&self) -> bool {
        self.layers.as_ref().is_some_and(DepthConfig::needs_answers)
            || self.decoding.as_ref().is_some_and(DecodingConfig::needs_rows)
    }

    /// The same with everything found on `waves` that it does not say: layers first, then the routing of the model that
    /// runs these, then what decoding learns from that model.
    ///
    /// # Errors
    /// As [`RoutingConfig::calibrated`], [`DepthConfig::calibrated`] and [`DecodingConfig::calibrated`].
    pub fn calibrated(&self, model: &Model, waves: &[Wave]) -> Result<Self> {
        if !self.needs_rows() && self.routing.as_ref().is_none_or(RoutingConfig::is_settled) {
            return Ok(self.clone());
        }
        if waves.is_empty() && self.needs_rows() {
            return Err(Error::input("waves to calibrate on", 0, "at least one"));
        }
        let mut found = Self { fold_norms: self.fold_norms, ..Self::default() };
        if let Some(layers) = &self.layers {
            let under = found.on(model)?;
            found.layers = Some(layers.calibrated(under.as_ref().unwrap_or(model), waves)?);
        }
        if let Some(routing) = &self.routing {
            let under = found.on(model)?;
            found.routing = Some(routing.calibrated(under.as_ref().unwrap_or(model), waves)?);
        }
        if let Some(decoding) = &self.decoding {
            let under = found.on(model)?;
            found.decoding = Some(decoding.calibrated(under.as_ref().unwrap_or(model), waves)?);
        }
        Ok(found)
    }

    /// The model run like this; `None` for the model itself, where nothing of it changes. How it
    /// [decodes](Self::decoding) is for whoever generates.
    ///
    /// # Errors
    /// As [`RoutingConfig::on`], [`DepthConfig::on`] and [`Model::with_folded_norms`]; [`Error::Input`] for decoding
    /// that is out of range or needs other models.
    pub fn on(&self, model: &Model) -> Result<Option<Model>> {
        if let Some(decoding) = &self.decoding {
            decoding.validate()?;
            if decoding.other_models() > 0 {
                let found = format!("{} beside the model", decoding.other_models());
                return Err(Error::input("models that decoding needs", found, "none, in run-time options of a model"));
            }
        }
        let mut found = match self.fold_norms {
            true => Some(model.with_folded_norms()?),
            false => None,
        };
        if let Some(layers) = &self.layers {
            found = Some(layers.on(found.as_ref().unwrap_or(model))?);
        }
        if let Some(routing) = &self.routing {
            found = Some(routing.on(found.as_ref().unwrap_or(model))?);
        }
        Ok(found)
    }

    /// Writes it as `run_time.json` into the directory of a model, where [`Model::open`] finds it, with the files that
    /// it needs: routers of layers, references of pathways.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] and [`Error::Io`] if it cannot be written.
    pub fn save_beside(&self, directory: &Path) -> Result<()> {
        let saved = Self {
            layers: self.layers.as_ref().map(|layers| layers.saved_into(directory)).transpose()?,
            decoding: self.decoding.as_ref().map(|decoding| decoding.saved_into(directory)).transpose()?,
            ..self.clone()
        };
        let value = serde_json::to_value(saved).map_err(|error| Error::input("run-time options", error, "JSON"))?;
        Ok(moe_checkpoint::write_json(&directory.join(Self::FILE), &value)?)
    }

    /// What stands beside a model; nothing changes where there is no file.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read; [`Error::Input`] names the file that is something else.
    pub fn beside(directory: &Path) -> Result<Self> {
        let path = directory.join(Self::FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let read: Self = serde_json::from_str(&text)
            .map_err(|error| Error::input(path.display().to_string(), error, "run-time options"))?;
        Ok(Self {
            layers: read.layers.map(|layers| layers.found_in(directory)),
            decoding: read.decoding.map(|decoding| decoding.found_in(directory)),
            ..read
        })
    }

    /// This on top of what stands beside a model: what it says counts, and what it leaves out stays.
    #[must_use]
    pub fn or(self, beside: Self) -> Self {
        Self {
            routing: self.routing.or(beside.routing),
            layers: self.layers.or(beside.layers),
            decoding: self.decoding.or(beside.decoding),
            fold_norms: self.fold_norms || beside.fold_norms,
        }
    }
}
