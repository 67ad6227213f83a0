//! Scorers as JSON.

use moe_checkpoint::Reduction;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Activation, Aimer, Attribution, Bias, ChannelNorms, Coalition, Combine, Coupled, Dern, Ean, Esft, ExpertMagnitude,
    Experts, Fisher, Frequency, Heapr, Magnitude, Man, Mone, Projection, Random, Reap, RouterScore, RouterTaylor,
    RoutingWeight, Scorer, Seer, Slimming, Taylor, Tenp, Units,
};
use crate::{Error, Result};

/// The one list of all scorers: what each is called, and what of it is the same for all. The name of a variant in snake
/// case must be the name given, which a test checks.
macro_rules! scorers {
    ($(#[doc = $doc:literal] $variant:ident = $name:literal,)*) => {
        /// A scorer with its parameters, as it stands in recipes: `{"type": "fisher", "criterion": "token"}`.
        /// Parameters that are left out have their defaults; unknown ones are refused.
        ///
        /// ```
        /// use moe_checkpoint::{Granularity, Reduction};
        /// use moe_importance::{Scorer, ScorerConfig};
        ///
        /// // Experts by the sum of the Fisher importance of their units.
        /// let fisher: ScorerConfig = serde_json::from_str(r#"{"type": "fisher"}"#)?;
        /// assert_eq!(fisher.into_experts(Reduction::Sum)?.build()?.needs().granularity, Granularity::Expert);
        ///
        /// // Units by the REAP score of their expert, and those of one expert by HEAPr's score.
        /// let units: ScorerConfig = serde_json::from_str(
        ///     r#"{"type": "units", "of": {"type": "reap", "gate": "renormalized"}, "tie_breaker": {"type": "heapr"}}"#,
        /// )?;
        /// assert_eq!(units.build()?.needs().granularity, Granularity::Unit);
        /// # Ok::<(), Box<dyn std::error::Error>>(())
        /// ```
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "type", rename_all = "snake_case", try_from = "Value")]
        #[non_exhaustive]
        pub enum ScorerConfig {
            $(#[doc = $doc] $variant($variant),)*
        }

        impl ScorerConfig {
            /// Names of all scorers.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// Name of each scorer and what it is in a few words, for help texts.
            pub const DESCRIPTIONS: &'static [(&'static str, &'static str)] = &[$(($name, $doc)),*];

            /// The scorer, its parameters checked.
            ///
            /// # Errors
            /// [`Error::InvalidField`] for parameters that are out of range or do not go together.
            pub fn build(&self) -> Result<Box<dyn Scorer>> {
                match self {
                    $(Self::$variant(scorer) => {
                        scorer.validate()?;
                        Ok(Box::new(scorer.clone()))
                    })*
                }
            }

            /// Its name in recipes.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                }
            }

            fn parse(name: &str, fields: Map<String, Value>) -> Result<Self> {
                match name {
                    $($name => Ok(Self::$variant(parameters(name, fields)?)),)*
                    _ => Err(Error::UnknownScorer { found: name.into(), known: Self::NAMES.join(", ") }),
                }
            }
        }

        $(impl From<$variant> for ScorerConfig {
            fn from(scorer: $variant) -> Self {
                Self::$variant(scorer)
            }
        })*
    };
}

scorers! {
    /// Units: squared or absolute gradients of the cross-entropy.
    Fisher = "fisher",
    /// Units: mean squared activation times mean squared gradient.
    Heapr = "heapr",
    /// Units: mean square of activation times gradient.
    Coupled = "coupled",
    /// Units: activation times gradient.
    Taylor = "taylor",
    /// Units: activation times norm of the down column.
    Activation = "activation",
    /// Units: projection of the unit's part on the expert's output.
    Projection = "projection",
    /// Units: norms of gate, up and their product over the routed tokens.
    ChannelNorms = "channel_norms",
    /// Units: norms of channels, with weights of experts and layers beside them.
    Slimming = "slimming",
    /// Units: norm of the unit's weights.
    Magnitude = "magnitude",
    /// Units: preference of the router, with a scorer of units below it.
    RouterScore = "router_score",
    /// Units: seeded noise.
    Random = "random",
    /// Experts: how often they are selected.
    Frequency = "frequency",
    /// Experts: routing weights, as applied, renormalized or softmax.
    RoutingWeight = "routing_weight",
    /// Experts: norm of the output.
    Ean = "ean",
    /// Experts: routing weight times norm of the output.
    Reap = "reap",
    /// Experts: mean norm of the output over routed tokens, or of its square.
    Man = "man",
    /// Experts: hard or soft counts.
    Seer = "seer",
    /// Experts: uniformity of the weights.
    Aimer = "aimer",
    /// Experts: norm of the weights.
    ExpertMagnitude = "expert_magnitude",
    /// Experts: gradients of the router row.
    RouterTaylor = "router_taylor",
    /// Experts: output that turns the hidden state.
    Tenp = "tenp",
    /// Experts: part of what the layer adds to the residual stream.
    Attribution = "attribution",
    /// Experts: Shapley value among the experts of a token.
    Coalition = "coalition",
    /// Experts: mean renormalized routing weight.
    Dern = "dern",
    /// Experts: share in the routing of the layer.
    Esft = "esft",
    /// Experts: spread of the output times routing score.
    Mone = "mone",
    /// Experts: accumulated bias.
    Bias = "bias",
    /// Experts: a unit scorer reduced.
    Experts = "experts",
    /// Units: an expert scorer with a tie-breaker of units.
    Units = "units",
}

impl ScorerConfig {
    /// As a scorer of units: itself if it is one, otherwise by the score of the expert first and `tie_breaker` second.
    ///
    /// # Errors
    /// As [`ScorerConfig::build`], of both; a tie-breaker that scores experts.
    pub fn into_units(self, tie_breaker: impl Into<ScorerConfig>) -> Result<Self> {
        if self.build()?.needs().granularity == moe_checkpoint::Granularity::Unit {
            return Ok(self);
        }
        let units = Units::new(self, tie_breaker, Combine::TieBreak);
        units.validate()?;
        Ok(units.into())
    }

    /// As a scorer of experts: itself if it is one, otherwise with the scores of an expert's units reduced to one.
    ///
    /// # Errors
    /// As [`ScorerConfig::build`]; a sum of scores that are not additive.
    pub fn into_experts(self, reduction: Reduction) -> Result<Self> {
        if self.build()?.needs().granularity == moe_checkpoint::Granularity::Expert {
            return Ok(self);
        }
        let experts = Experts::new(self, reduction);
        experts.validate()?;
        Ok(experts.into())
    }
}

impl TryFrom<Value> for ScorerConfig {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            return Err(Error::NotAnObject { found: value.to_string() });
        };
        let invalid = |reason: String| Error::InvalidField { scorer: "?".into(), field: "type".into(), reason };
        match fields.remove("type") {
            Some(Value::String(name)) => Self::parse(&name, fields),
            Some(other) => Err(invalid(format!("found {other}, expected a string"))),
            None => Err(invalid(format!("missing; there are {}", Self::NAMES.join(", ")))),
        }
    }
}

/// A scorer as it stands in recipes.
pub(super) fn recipe(config: impl Into<ScorerConfig>) -> Value {
    serde_json::to_value(config.into()).expect("enums, numbers and strings are always JSON")
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
            let config: ScorerConfig = serde_json::from_str(&format!(r#"{{"type": "{name}"}}"#)).unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<ScorerConfig>(&json).unwrap(), config, "{json}");
            let scorer = config.build().unwrap();
            assert_eq!((scorer.name(), config.name()), (*name, *name));
            assert_eq!(scorer.recipe().to_string(), json);
        }
    }

    #[test]
    fn errors_name_the_field() {
        for (json, expected) in [
            ("3", "a scorer is a JSON object with a field `type`, found 3"),
            ("{}", "scorer `?`: field `type`: missing; there are fisher, heapr, coupled"),
            (r#"{"type": 1}"#, "scorer `?`: field `type`: found 1, expected a string"),
            (r#"{"type": "fish"}"#, "scorer `fish` is not known; there are fisher, heapr, coupled"),
            (
                r#"{"type": "fisher", "criterion": "tokens"}"#,
                "scorer `fisher`: field `criterion`: unknown variant `tokens`, expected one of `token`, `sequence`, `abs`",
            ),
            (
                r#"{"type": "fisher", "criterium": "token"}"#,
                "field `criterium`: unknown field `criterium`, expected `criterion`",
            ),
            (r#"{"type": "magnitude", "norm": 1}"#, "scorer `magnitude`: field `norm`: unknown field `norm`"),
            (
                r#"{"type": "random", "seed": -1}"#,
                "scorer `random`: field `seed`: invalid value: integer `-1`, expected u64",
            ),
            (
                r#"{"type": "router_score", "unit": {"type": "activation", "denominator": "all"}}"#,
                "scorer `router_score`: field `unit`: scorer `activation`: field `denominator`: unknown variant `all`",
            ),
        ] {
            let found = error(json);
            assert!(found.contains(expected), "{json}: {found}");
        }
    }

    #[test]
    fn parameters_out_of_range_are_refused_when_built() {
        for (json, expected) in [
            (r#"{"type": "reap", "power": 3}"#, "scorer `reap`: field `power`: found 3, expected 1 or 2"),
            (r#"{"type": "bias", "step": 0}"#, "scorer `bias`: field `step`: found 0, expected a number above 0"),
            (r#"{"type": "projection", "weighting": "square"}"#, "field `weighting`: found `square`"),
            (
                r#"{"type": "units", "of": {"type": "fisher"}}"#,
                "scorer `units`: field `of`: found scorer `fisher`, expected a scorer of experts",
            ),
            (
                r#"{"type": "units", "tie_breaker": {"type": "reap"}}"#,
                "scorer `units`: field `tie_breaker`: found scorer `reap`, expected a scorer of units",
            ),
            (
                r#"{"type": "router_score", "unit": {"type": "reap"}}"#,
                "scorer `router_score`: field `unit`: found scorer `reap`, expected a scorer of units",
            ),
            (r#"{"type": "experts", "of": {"type": "reap", "power": 0}}"#, "scorer `reap`: field `power`: found 0"),
            (
                r#"{"type": "experts", "of": {"type": "router_score"}}"#,
                "scorer `experts`: field `reduction`: found `sum`, expected `mean`, `max` or `top`: scores of `router_score` are not additive",
            ),
        ] {
            let config: ScorerConfig = serde_json::from_str(json).unwrap();
            let found = config.build().err().unwrap().to_string();
            assert!(found.contains(expected), "{json}: {found}");
        }
        assert!(error(r#"{"type": "experts", "reduction": {"top": 0}}"#).contains("field `reduction`"));
    }

    #[test]
    fn any_scorer_becomes_one_of_units_or_of_experts() {
        for name in ScorerConfig::NAMES {
            let config: ScorerConfig = serde_json::from_str(&format!(r#"{{"type": "{name}"}}"#)).unwrap();
            let units = config.clone().into_units(Magnitude::new()).unwrap();
            assert_eq!(units.build().unwrap().needs().granularity, moe_checkpoint::Granularity::Unit, "{name}");
            assert_eq!(units.clone().into_units(Random::new(1)).unwrap(), units);
            let experts = config.clone().into_experts(Reduction::Max).unwrap();
            assert_eq!(experts.build().unwrap().needs().granularity, moe_checkpoint::Granularity::Expert, "{name}");
            assert!(units == config || experts == config, "{name} is one of both already");
        }
        let reap = ScorerConfig::from(Reap::default());
        assert!(reap.clone().into_units(reap).is_err());
    }
}
