//! Where statistics and scores come from.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a statistic or score file was made from. Files of different provenance are never combined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Hash of the calibration data; empty for what needs none.
    pub data: String,
    /// The recipe of the run, as JSON.
    pub recipe: String,
    /// Version of the crates that made it. Recorded for people; it is not part of the comparison.
    pub crate_version: String,
}

impl Provenance {
    /// A provenance of this version of the crates.
    pub fn new(model: impl Into<String>, data: impl Into<String>, recipe: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            data: data.into(),
            recipe: recipe.into(),
            crate_version: env!("CARGO_PKG_VERSION").to_string(),
        }
    }

    /// Checks that `found` was made from the same model, data and recipe. `what` names what carries `found`: a file.
    ///
    /// # Errors
    /// [`Error::ProvenanceMismatch`] names the first field that differs, what was found and what was expected.
    pub fn expect(&self, found: &Provenance, what: &str) -> Result<()> {
        let fields = [
            ("model fingerprint", &self.model, &found.model),
            ("data hash", &self.data, &found.data),
            ("recipe", &self.recipe, &found.recipe),
        ];
        for (field, expected, found) in fields {
            if expected != found {
                return Err(Error::ProvenanceMismatch {
                    what: what.to_string(),
                    field,
                    found: found.clone(),
                    expected: expected.clone(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_named_and_the_version_is_ignored() {
        let ours = Provenance::new("m", "d", "{}");
        let mut other = Provenance { crate_version: "0.0.0".into(), ..ours.clone() };
        ours.expect(&other, "wave").unwrap();
        other.data = "e".into();
        let message = ours.expect(&other, "wave").unwrap_err().to_string();
        for part in ["wave", "data hash", "`e`", "`d`"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
