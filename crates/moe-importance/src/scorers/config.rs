//! Scorers as JSON.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Activation, Fisher, Magnitude, Random, RouterScore, Scorer};
use crate::{Error, Result};

/// A scorer with its parameters, as it stands in recipes: `{"scorer": "fisher", "criterion": "token"}`. Parameters that
/// are left out have their defaults; unknown ones are refused.
///
/// ```
/// use moe_importance::{Scorer, ScorerConfig};
///
/// let json = r#"{"scorer": "router_score", "combine": "multiply", "unit": {"scorer": "activation"}}"#;
/// let config: ScorerConfig = serde_json::from_str(json)?;
/// assert!(config.build()?.reads_weights());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "scorer", rename_all = "snake_case", try_from = "Value")]
#[non_exhaustive]
pub enum ScorerConfig {
    /// Squared or absolute gradients of the cross-entropy.
    Fisher(Fisher),
    /// Activation times norm of the down column.
    Activation(Activation),
    /// Norm of the unit's weights.
    Magnitude(Magnitude),
    /// Preference of the router, with a scorer of units below it.
    RouterScore(RouterScore),
    /// Seeded noise.
    Random(Random),
}

impl ScorerConfig {
    /// Names of all scorers.
    pub const NAMES: [&'static str; 5] = ["fisher", "activation", "magnitude", "router_score", "random"];

    /// The scorer, its parameters checked.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for parameters that do not go together.
    pub fn build(&self) -> Result<Box<dyn Scorer>> {
        Ok(match self {
            Self::Fisher(scorer) => Box::new(*scorer),
            Self::Activation(scorer) => Box::new(*scorer),
            Self::Magnitude(scorer) => Box::new(*scorer),
            Self::RouterScore(scorer) => {
                scorer.validate()?;
                Box::new(scorer.clone())
            }
            Self::Random(scorer) => Box::new(*scorer),
        })
    }
}

impl TryFrom<Value> for ScorerConfig {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            return Err(Error::NotAnObject { found: value.to_string() });
        };
        let invalid = |reason: String| Error::InvalidField { scorer: "?".into(), field: "scorer".into(), reason };
        let name = match fields.remove("scorer") {
            Some(Value::String(name)) => name,
            Some(other) => return Err(invalid(format!("found {other}, expected a string"))),
            None => return Err(invalid(format!("missing; there are {}", Self::NAMES.join(", ")))),
        };
        Ok(match name.as_str() {
            "fisher" => Self::Fisher(parameters(&name, fields)?),
            "activation" => Self::Activation(parameters(&name, fields)?),
            "magnitude" => Self::Magnitude(parameters(&name, fields)?),
            "router_score" => Self::RouterScore(parameters(&name, fields)?),
            "random" => Self::Random(parameters(&name, fields)?),
            _ => return Err(Error::UnknownScorer { found: name, known: Self::NAMES.join(", ") }),
        })
    }
}

/// One line of JSON for a scorer.
pub(super) fn recipe(config: impl Into<ScorerConfig>) -> String {
    serde_json::to_string(&config.into()).expect("enums, numbers and strings are always JSON")
}

/// Reads parameters, all of which have defaults. Errors of serde do not name the field of a wrong value, so each field
/// is also read alone.
fn parameters<T: DeserializeOwned>(scorer: &str, fields: Map<String, Value>) -> Result<T> {
    let invalid = |field: &str, error: serde_json::Error| Error::InvalidField {
        scorer: scorer.into(),
        field: field.into(),
        reason: error.to_string(),
    };
    for (field, value) in &fields {
        let alone = Map::from_iter([(field.clone(), value.clone())]);
        serde_json::from_value::<T>(Value::Object(alone)).map_err(|error| invalid(field, error))?;
    }
    let names = fields.keys().cloned().collect::<Vec<_>>().join(", ");
    serde_json::from_value(Value::Object(fields)).map_err(|error| invalid(&names, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        serde_json::from_str::<ScorerConfig>(json).unwrap_err().to_string()
    }

    #[test]
    fn every_scorer_survives_a_round_trip_and_has_defaults() {
        for name in ScorerConfig::NAMES {
            let config: ScorerConfig = serde_json::from_str(&format!(r#"{{"scorer": "{name}"}}"#)).unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<ScorerConfig>(&json).unwrap(), config, "{json}");
            let scorer = config.build().unwrap();
            assert_eq!(scorer.name(), name);
            assert_eq!(scorer.recipe(), json);
        }
    }

    #[test]
    fn errors_name_the_field() {
        for (json, expected) in [
            ("3", "a scorer is a JSON object with a field `scorer`, found 3"),
            (
                "{}",
                "scorer `?`: field `scorer`: missing; there are fisher, activation, magnitude, router_score, random",
            ),
            (r#"{"scorer": 1}"#, "scorer `?`: field `scorer`: found 1, expected a string"),
            (
                r#"{"scorer": "fish"}"#,
                "scorer `fish` is not known; there are fisher, activation, magnitude, router_score, random",
            ),
            (
                r#"{"scorer": "fisher", "criterion": "tokens"}"#,
                "scorer `fisher`: field `criterion`: unknown variant `tokens`, expected one of `token`, `sequence`, `abs`",
            ),
            (
                r#"{"scorer": "fisher", "criterium": "token"}"#,
                "field `criterium`: unknown field `criterium`, expected `criterion`",
            ),
            (r#"{"scorer": "magnitude", "norm": 1}"#, "scorer `magnitude`: field `norm`: unknown field `norm`"),
            (
                r#"{"scorer": "random", "seed": -1}"#,
                "scorer `random`: field `seed`: invalid value: integer `-1`, expected u64",
            ),
            (
                r#"{"scorer": "router_score", "unit": {"scorer": "activation", "denominator": "all"}}"#,
                "scorer `router_score`: field `unit`: scorer `activation`: field `denominator`: unknown variant `all`",
            ),
        ] {
            let found = error(json);
            assert!(found.contains(expected), "{json}: {found}");
        }
    }
}
