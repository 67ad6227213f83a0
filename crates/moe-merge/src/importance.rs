//! How much an expert matters: what dominants are chosen by and members are weighted with.

use serde::{Deserialize, Serialize};

use crate::evidence::{LayerEvidence, ROUTED_TOKENS, ROUTING_WEIGHT, SCORE};
use crate::{Error, Result};

/// Which routing weight multiplies an output norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// As the model applies it.
    #[default]
    Applied,
    /// Divided by the sum over the token's top-k.
    Renormalised,
    /// The softmax over all experts.
    Softmax,
}

/// How much an expert matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Importance {
    /// Share of all selections in the layer (M-SMoE): tokens routed to the expert over those routed to any.
    Usage,
    /// Mean gate over all tokens, 0 where not selected (DERN, step 1, where it is renormalised).
    RoutingWeight {
        /// The gate.
        #[serde(default)]
        gate: Gate,
    },
    /// REAP: `1 / |X_e| * sum_{t in X_e} g_t[e]^power |f_e(x_t)|`. Power 1 is the paper's, power 2 what REAM's code computes.
    Reap {
        /// The gate.
        #[serde(default)]
        gate: Gate,
        /// Its power: 1 or 2.
        #[serde(default = "one")]
        power: u8,
    },
    /// Scores of a table ([`Evidence::add_scores`](crate::Evidence::add_scores)), larger is more important.
    Score,
    /// All experts alike.
    Equal,
}

fn one() -> u8 {
    1
}

impl Importance {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a power other than 1 and 2.
    pub fn validate(self) -> Result<()> {
        match self {
            Self::Reap { power, .. } if !(1..=2).contains(&power) => {
                Err(Error::parameter("importance.power", power, "1 or 2"))
            }
            _ => Ok(()),
        }
    }

    /// Names of the statistics it is made from.
    pub fn statistics(self) -> Vec<&'static str> {
        match self {
            Self::Usage => vec![ROUTED_TOKENS],
            Self::RoutingWeight { gate } => vec![weight(gate)],
            Self::Reap { gate, power } => vec![ROUTED_TOKENS, norm(gate, power)],
            Self::Score => vec![SCORE],
            Self::Equal => vec![],
        }
    }

    /// Importance of each of `experts` experts, not negative.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`] names the statistic, [`Error::InvalidEvidence`] a negative one.
    pub fn of(self, evidence: &LayerEvidence, experts: usize) -> Result<Vec<f64>> {
        let sum = |name| evidence.sum(name, "importance");
        let values: Vec<f64> = match self {
            Self::Usage => {
                let counts = sum(ROUTED_TOKENS)?;
                let total: f64 = counts.iter().sum();
                counts.iter().map(|count| if total > 0.0 { count / total } else { 0.0 }).collect()
            }
            Self::RoutingWeight { gate } => {
                let tokens = evidence.tokens.max(1) as f64;
                sum(weight(gate))?.iter().map(|weight| weight / tokens).collect()
            }
            Self::Reap { gate, power } => {
                let mean = |(sum, count): (&f64, &f64)| if *count > 0.0 { sum / count } else { 0.0 };
                sum(norm(gate, power))?.iter().zip(sum(ROUTED_TOKENS)?).map(mean).collect()
            }
            Self::Score => sum(SCORE)?.to_vec(),
            Self::Equal => vec![1.0; experts],
        };
        if values.len() != experts {
            let reason = format!("layer {}: {} experts, expected {experts}", evidence.layer, values.len());
            return Err(Error::invalid_evidence(reason));
        }
        if let Some((expert, value)) = values.iter().enumerate().find(|(_, v)| !(v.is_finite() && **v >= 0.0)) {
            let layer = evidence.layer;
            let reason = format!("layer {layer}, expert {expert}: importance {value}, expected 0 or more");
            return Err(Error::invalid_evidence(reason));
        }
        Ok(values)
    }
}

fn weight(gate: Gate) -> &'static str {
    match gate {
        Gate::Applied => ROUTING_WEIGHT,
        Gate::Renormalised => "routing.renormalised",
        Gate::Softmax => "routing.softmax",
    }
}

fn norm(gate: Gate, power: u8) -> &'static str {
    match (gate, power) {
        (Gate::Applied, 1) => "output.norm_applied",
        (Gate::Applied, _) => "output.norm_applied_square",
        (Gate::Renormalised, 1) => "output.norm_renormalised",
        (Gate::Renormalised, _) => "output.norm_renormalised_square",
        (Gate::Softmax, 1) => "output.norm_softmax",
        (Gate::Softmax, _) => "output.norm_softmax_square",
    }
}

/// Experts by falling importance; ties by index.
pub(crate) fn ranked(importance: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]).then(a.cmp(b)));
    order
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn importance_follows_its_definition() {
        let sums = [
            (ROUTED_TOKENS, vec![6.0, 2.0, 0.0]),
            (ROUTING_WEIGHT, vec![1.5, 2.0, 0.0]),
            ("output.norm_softmax_square", vec![3.0, 8.0, 0.0]),
        ];
        let evidence = LayerEvidence {
            tokens: 4,
            sums: BTreeMap::from(sums.map(|(name, values)| (name.to_string(), values))),
            ..LayerEvidence::default()
        };
        let of = |importance: Importance| importance.of(&evidence, 3).unwrap();
        assert_eq!(of(Importance::Usage), [0.75, 0.25, 0.0]);
        assert_eq!(of(Importance::RoutingWeight { gate: Gate::Applied }), [0.375, 0.5, 0.0]);
        assert_eq!(of(Importance::Reap { gate: Gate::Softmax, power: 2 }), [0.5, 4.0, 0.0]);
        assert_eq!(of(Importance::Equal), [1.0; 3]);
        assert_eq!(ranked(&of(Importance::RoutingWeight { gate: Gate::Applied })), [1, 0, 2]);
        assert_eq!(ranked(&[1.0, 1.0, 2.0]), [2, 0, 1]);
        let missing = Importance::Score.of(&evidence, 3).unwrap_err().to_string();
        assert!(missing.contains("`score`"), "{missing}");
        let json: Importance = serde_json::from_str(r#"{"type": "reap"}"#).unwrap();
        assert_eq!(json, Importance::Reap { gate: Gate::Applied, power: 1 });
        assert!(Importance::Reap { gate: Gate::Applied, power: 3 }.validate().is_err());
    }
}
