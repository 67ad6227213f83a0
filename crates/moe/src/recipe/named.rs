//! A method by its name, or with its parameters.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// A method by its name, or with its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Named {
    /// The name; parameters as published.
    Name(String),
    /// An object as the method's crate documents it.
    Parameters(serde_json::Map<String, Value>),
}

impl Named {
    /// A name, JSON text, or a file of JSON, whose name ends in `.json`.
    ///
    /// # Errors
    /// Text that begins as JSON but is none, a file that cannot be read.
    pub fn parse(text: &str) -> Result<Self, String> {
        let object = |json: &str| serde_json::from_str(json).map(Self::Parameters).map_err(|error| error.to_string());
        let text = text.trim();
        match (text.starts_with('{'), text.ends_with(".json")) {
            (true, _) => object(text),
            (_, true) => {
                let json = std::fs::read_to_string(text).map_err(|error| format!("{text}: {error}"))?;
                object(&json).map_err(|error| format!("{text}: {error}"))
            }
            _ => Ok(Self::Name(text.to_string())),
        }
    }

    /// The object that names the method by the key `tag`.
    pub fn object(&self, tag: &str) -> serde_json::Map<String, Value> {
        match self {
            Self::Name(name) => serde_json::Map::from_iter([(tag.to_string(), Value::from(name.as_str()))]),
            Self::Parameters(map) => map.clone(),
        }
    }

    /// The method, which the key `tag` names.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name or wrong parameters.
    pub fn read<T: DeserializeOwned>(&self, tag: &str, what: &str) -> Result<T> {
        serde_json::from_value(Value::Object(self.object(tag)))
            .map_err(|error| Error::Usage(format!("{what} {}: {error}", self.shown())))
    }

    fn shown(&self) -> String {
        match self {
            Self::Name(name) => format!("`{name}`"),
            Self::Parameters(map) => Value::Object(map.clone()).to_string(),
        }
    }
}
