//! How much an expert matters: what dominants are chosen by and members are weighted with.

use moe_checkpoint::{Fold, MoeLayerShape, MoeShape, Provenance, Statistics};
use moe_importance::scorers::{Average, Esft, EsftScore, Gate, Reap, RoutingWeight};
use moe_importance::{NoWeights, Scorer};
use serde::{Deserialize, Serialize};

use crate::evidence::{LayerEvidence, SCORE};
use crate::{Error, Result};

/// How much an expert matters: the name of a scorer of moe-importance, or the scores of any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Importance {
    /// Share of all selections in the layer (M-SMoE): [`Esft`] with [`EsftScore::Token`].
    Usage,
    /// [`RoutingWeight`]: mean gate over all tokens, 0 where not selected (DERN, step 1, where it is renormalized).
    RoutingWeight {
        /// The gate.
        #[serde(default)]
        gate: Gate,
    },
    /// [`Reap`]: `1 / |X_e| * sum_{t in X_e} g_t[e]^power |f_e(x_t)|`. Power 1 is the paper's, power 2 what REAM's code
    /// computes.
    Reap {
        /// The gate.
        #[serde(default)]
        gate: Gate,
        /// Its power: 1 or 2.
        #[serde(default = "one")]
        power: u8,
    },
    /// Scores of a table of any scorer ([`Evidence::add_scores`](crate::Evidence::add_scores)), larger is more
    /// important.
    Score,
    /// All experts alike.
    Equal,
}

fn one() -> u8 {
    1
}

impl Importance {
    /// The scorer that it names.
    fn scorer(self) -> Option<Box<dyn Scorer>> {
        Some(match self {
            Self::Usage => Box::new(Esft::new(EsftScore::Token)),
            Self::RoutingWeight { gate } => Box::new(RoutingWeight::new(gate, Average::AllTokens)),
            Self::Reap { gate, power } => Box::new(Reap::new(gate, power, Average::RoutedTokens)),
            Self::Score | Self::Equal => return None,
        })
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a power other than 1 and 2.
    pub fn validate(self) -> Result<()> {
        match (self, self.scorer().map(|scorer| scorer.validate())) {
            (Self::Reap { power, .. }, Some(Err(_))) => Err(Error::parameter("importance.power", power, "1 or 2")),
            (_, Some(Err(error))) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Names of the statistics it is made from.
    pub fn statistics(self) -> Vec<String> {
        match (self, self.scorer()) {
            (_, Some(scorer)) => scorer.needs().statistics.iter().map(ToString::to_string).collect(),
            (Self::Score, None) => vec![SCORE.into()],
            _ => vec![],
        }
    }

    /// Importance of each of `experts` experts, not negative.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`] names the statistic, [`Error::InvalidEvidence`] a negative one.
    pub fn of(self, evidence: &LayerEvidence, experts: usize) -> Result<Vec<f64>> {
        let values: Vec<f64> = match (self, self.scorer()) {
            (_, Some(scorer)) => scored(&*scorer, evidence, experts)?,
            (Self::Score, None) => evidence.sum(SCORE, "importance")?.to_vec(),
            _ => vec![1.0; experts],
        };
        check_count(evidence, values.len(), experts)?;
        if let Some((expert, value)) = values.iter().enumerate().find(|(_, v)| !(v.is_finite() && **v >= 0.0)) {
            let layer = evidence.layer;
            let reason = format!("layer {layer}, expert {expert}: importance {value}, expected 0 or more");
            return Err(Error::invalid_evidence(reason));
        }
        Ok(values)
    }
}

fn check_count(evidence: &LayerEvidence, found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => {
            Err(Error::invalid_evidence(format!("layer {}: {found} experts, expected {expected}", evidence.layer)))
        }
    }
}

/// Scores of the experts of one layer, from the sums that its evidence holds.
fn scored(scorer: &dyn Scorer, evidence: &LayerEvidence, experts: usize) -> Result<Vec<f64>> {
    let layer = evidence.layer;
    let layers = vec![MoeLayerShape { layer, widths: vec![0; experts] }];
    let shape = MoeShape { gateless: false, hidden_size: 1, top_k: 1, layers };
    let mut statistics = Statistics::new(&shape, Provenance::new("", "", "{}"));
    for id in scorer.needs().statistics {
        let sums = evidence.sum(id.as_str(), "importance")?;
        check_count(evidence, sums.len(), experts)?;
        statistics.expert_mut(id.as_str(), Fold::Sum, layer)?.copy_from_slice(sums);
    }
    statistics.add_counts(evidence.tokens.max(1), 1, 0);
    let table = scorer.score(&statistics, &NoWeights)?;
    Ok(table.layers.iter().flat_map(|layer| layer.scores.iter().flatten()).copied().map(f64::from).collect())
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
            ("routing.tokens", vec![6.0, 2.0, 0.0]),
            ("routing.weight", vec![1.5, 2.0, 0.0]),
            ("output.norm_softmax_square", vec![3.0, 8.0, 0.0]),
        ];
        let evidence = LayerEvidence {
            tokens: 4,
            sums: BTreeMap::from(sums.map(|(name, values)| (name.to_string(), values))),
            ..LayerEvidence::default()
        };
        let of = |importance: Importance| importance.of(&evidence, 3).unwrap();
        assert_eq!(of(Importance::Usage), [0.75, 0.25, 0.0]);
        assert_eq!(of(Importance::RoutingWeight { gate: Gate::AsApplied }), [0.375, 0.5, 0.0]);
        assert_eq!(of(Importance::Reap { gate: Gate::Softmax, power: 2 }), [0.5, 4.0, 0.0]);
        assert_eq!(of(Importance::Equal), [1.0; 3]);
        assert_eq!(ranked(&of(Importance::RoutingWeight { gate: Gate::AsApplied })), [1, 0, 2]);
        assert_eq!(ranked(&[1.0, 1.0, 2.0]), [2, 0, 1]);
        let missing = Importance::Score.of(&evidence, 3).unwrap_err().to_string();
        assert!(missing.contains("`score`"), "{missing}");
        let json: Importance = serde_json::from_str(r#"{"type": "reap"}"#).unwrap();
        assert_eq!(json, Importance::Reap { gate: Gate::AsApplied, power: 1 });
        assert!(Importance::Reap { gate: Gate::AsApplied, power: 3 }.validate().is_err());
        assert_eq!(
            Importance::Reap { gate: Gate::Renormalized, power: 2 }.statistics(),
            ["output.norm_renormalized_square", "routing.tokens",]
        );
        // One name of the gate, that of moe-importance.
        assert_eq!(serde_json::to_string(&json).unwrap(), r#"{"type":"reap","gate":"as_applied","power":1}"#);
        assert!(serde_json::from_str::<Importance>(r#"{"type": "reap", "gate": "applied"}"#).is_err());
        let short = Importance::Usage.of(&evidence, 4).unwrap_err().to_string();
        assert!(short.contains("3 experts, expected 4"), "{short}");
    }
}
