//! Which experts a task uses: ESFT (arXiv 2407.01906).

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Granularity, ScoreTable};
use moe_importance::{Calibration, NoWeights, Scorer, scorers};
use serde::{Deserialize, Serialize};

pub use moe_importance::scorers::EsftScore;

use crate::{Error, Result, model_weights::OwnWeights};

/// Trains the experts a task uses most, and nothing else: in each layer the best-scored ones until their scores sum to
/// a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Esft {
    /// What is counted.
    pub score: EsftScore,
    /// The threshold p, in (0, 1]; the expert that crosses it is trained, too. The paper takes 0.2 for tokens and 0.1
    /// for gates.
    pub threshold: f64,
    /// Train shared experts as well.
    pub shared_experts: bool,
    /// Train everything that is no expert as well.
    pub non_expert_modules: bool,
}

impl Default for Esft {
    fn default() -> Self {
        Self { score: EsftScore::Token, threshold: 0.2, shared_experts: false, non_expert_modules: false }
    }
}

/// Experts in the order in which they are taken, until their scores sum to `threshold`: the highest first, the lower
/// index on a tie, none without a score.
pub fn experts_to(scores: &[f64], threshold: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).filter(|e| scores[*e] > 0.0).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let mut sum = 0.0;
    order
        .into_iter()
        .take_while(|e| {
            let before = sum;
            sum += scores[*e];
            // Scores of a table are f32: a sum that reaches the threshold but for their rounding has reached it.
            before < threshold * (1.0 - 1e-7)
        })
        .collect()
}

impl Esft {
    /// # Errors
    /// [`Error::Input`] for a threshold that is not in (0, 1].
    pub fn validate(&self) -> Result<()> {
        match self.threshold {
            p if p > 0.0 && p <= 1.0 => Ok(()),
            p => Err(Error::input("threshold", p, "a number above 0, up to 1")),
        }
    }

    /// What the experts are scored by.
    pub fn scorer(&self) -> scorers::Esft {
        scorers::Esft::new(self.score)
    }

    /// Scores of the experts on the rows of a calibration, which is run for it.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and those of the calibration.
    pub fn scores(&self, calibration: Calibration<'_>) -> Result<ScoreTable> {
        self.validate()?;
        let scorer = self.scorer();
        let statistics = calibration.scorers([&scorer as &dyn Scorer]).run(&mut |_| {})?;
        Ok(scorer.score(&statistics, &NoWeights)?)
    }

    /// The experts of each layer, by a table of their scores: of [`Esft::scores`], or of any other scorer.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Input`] for a table of units, [`Error::Checkpoint`] for one that is
    /// broken.
    pub fn select(&self, scores: &ScoreTable) -> Result<EsftSelection> {
        self.validate()?;
        scores.validate()?;
        if scores.granularity != Granularity::Expert {
            return Err(Error::input("granularity of the scores", "unit", "expert: reduce the units to experts first"));
        }
        let layer = |scores: &moe_checkpoint::LayerScores| (scores.layer, experts_to(&scores.flat(), self.threshold));
        Ok(EsftSelection {
            experts: scores.layers.iter().map(layer).collect(),
            shared_experts: self.shared_experts,
            non_expert_modules: self.non_expert_modules,
        })
    }
}

/// A selection of experts, as the released configuration files have it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EsftSelection {
    /// Experts by decoder layer, best first.
    pub experts: BTreeMap<usize, Vec<usize>>,
    /// Whether shared experts are trained.
    #[serde(default)]
    pub shared_experts: bool,
    /// Whether everything that is no expert is trained.
    #[serde(default)]
    pub non_expert_modules: bool,
}

impl EsftSelection {
    /// The weights to train.
    pub fn weights(&self) -> OwnWeights {
        let others = match self.non_expert_modules {
            true => OwnWeights { experts: false, shared: false, shared_gate: true, ..OwnWeights::full() },
            false => OwnWeights::default(),
        };
        let only =
            self.experts.iter().map(|(layer, experts)| (*layer, experts.iter().copied().collect::<BTreeSet<_>>()));
        OwnWeights { experts: true, only: Some(only.collect()), shared: self.shared_experts, ..others }
    }
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Denominator, LayerScores, Pool, Provenance};

    use super::*;

    #[test]
    fn the_expert_that_crosses_the_threshold_is_taken() {
        let scores = [0.05, 0.12, 0.5, 0.03, 0.3];
        assert_eq!(experts_to(&scores, 0.2), [2]);
        assert_eq!(experts_to(&scores, 0.6), [2, 4]);
        assert_eq!(experts_to(&[0.0, 0.5, 0.0, 0.5], 1.0), [1, 3]);
        assert_eq!(experts_to(&scores, 1.0), [2, 4, 1, 0, 3]);
    }

    #[test]
    fn scores_permute_with_the_experts() {
        let scores = [0.05, 0.12, 0.5, 0.03, 0.3];
        let order = [3, 0, 4, 1, 2];
        let permuted: Vec<f64> = order.iter().map(|e| scores[*e]).collect();
        for p in [0.1, 0.5, 0.7, 0.95] {
            let found: Vec<usize> = experts_to(&permuted, p).into_iter().map(|e| order[e]).collect();
            assert_eq!(found, experts_to(&scores, p));
        }
    }

    #[test]
    fn a_table_of_scores_selects_and_one_of_units_is_refused() {
        let layer =
            LayerScores { layer: 1, scores: vec![vec![0.5], vec![0.375], vec![0.125]], routed: None, whole: None };
        let table = ScoreTable {
            scorer: r#"{"type":"esft"}"#.into(),
            granularity: Granularity::Expert,
            pool: Pool::Layer,
            additive: None,
            denominator: Denominator::None,
            layers: vec![layer],
            provenance: Provenance::new("model", "data", "{}"),
        };
        let selection = Esft { threshold: 0.6, ..Esft::default() }.select(&table).unwrap();
        let json = serde_json::to_string(&selection).unwrap();
        assert_eq!(json, r#"{"experts":{"1":[0,1]},"shared_experts":false,"non_expert_modules":false}"#);
        assert_eq!(serde_json::from_str::<EsftSelection>(&json).unwrap(), selection);
        let weights = selection.weights();
        assert_eq!(weights.only, Some([(1, [0, 1].into())].into()));
        assert!(weights.experts && !weights.attention && !weights.router);
        assert!(Esft { threshold: 0.0, ..Esft::default() }.select(&table).is_err());
        let error = Esft::default().select(&ScoreTable { granularity: Granularity::Unit, ..table }).unwrap_err();
        assert!(error.to_string().contains("found unit, expected expert"), "{error}");
    }

    #[test]
    fn scores_that_reach_the_threshold_but_for_their_rounding_have_reached_it() {
        let scores = [0.7f32, 0.3].map(f64::from);
        assert!(scores[0] < 0.7);
        assert_eq!(experts_to(&scores, 0.7), [0]);
        assert_eq!(experts_to(&scores, 1.0), [0, 1]);
    }
}
