//! Everything that a model does at run time, as one value and one file beside the model.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::RoutingConfig;
use crate::{
    Model,
    data::Wave,
    depth::LayerPath,
    error::{Error, Result},
};

/// How a model is run: its routing, and the layers that tokens go through. Nothing changes by default.
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
    /// The layers that tokens go through, such as `0-3,5,5,6a`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<LayerPath>,
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
    }

    /// The same with every number said, found on `waves` where it was not: under the path of layers, which is the model
    /// that will be run.
    ///
    /// # Errors
    /// As [`RoutingConfig::calibrated`].
    pub fn calibrated(&self, model: &Model, waves: &[Wave]) -> Result<Self> {
        let Some(routing) = self.routing.as_ref().filter(|routing| routing.needs_rows()) else {
            return Ok(self.clone());
        };
        let under = Self { routing: None, layers: self.layers.clone() }.on(model)?;
        let routing = routing.calibrated(under.as_ref().unwrap_or(model), waves)?;
        Ok(Self { routing: Some(routing), layers: self.layers.clone() })
    }

    /// The model run like this; `None` for the model itself, where nothing changes.
    ///
    /// # Errors
    /// As [`RoutingConfig::on`] and [`Model::with_path`].
    pub fn on(&self, model: &Model) -> Result<Option<Model>> {
        let mut found = match &self.layers {
            Some(path) => Some(model.with_path(path.clone())?),
            None => None,
        };
        if let Some(routing) = &self.routing {
            found = Some(routing.on(found.as_ref().unwrap_or(model))?);
        }
        Ok(found)
    }

    /// Writes it as `run_time.json` into the directory of a model, where [`Model::open`] finds it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be written.
    pub fn save_beside(&self, directory: &Path) -> Result<()> {
        let value = serde_json::to_value(self).map_err(|error| Error::input("run-time options", error, "JSON"))?;
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
        let read = serde_json::from_str(&text);
        read.map_err(|error| Error::input(path.display().to_string(), error, "run-time options"))
    }

    /// This on top of what stands beside a model: what it says counts, and what it leaves out stays.
    #[must_use]
    pub fn or(self, beside: Self) -> Self {
        Self { routing: self.routing.or(beside.routing), layers: self.layers.or(beside.layers) }
    }
}
