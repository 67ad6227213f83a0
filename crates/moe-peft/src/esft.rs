//! Which experts a task uses: ESFT (arXiv 2407.01906).

use std::collections::{BTreeMap, BTreeSet};

use moe_core::{
    Engine, EngineOptions, Model,
    data::Wave,
    trace::{LayerTrace, Observer, Signals},
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, model_weights::OwnWeights};

/// How an expert's use is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EsftScore {
    /// Mean routing weight over the tokens, 0 where the expert is not selected. Not rescaled: the scores of a layer sum to what the model's
    /// routing weights sum to, which is how the published adapters come about.
    Gate,
    /// Share of the selections, `selected / (tokens * k)`; sums to 1 over a layer.
    #[default]
    Token,
}

/// Trains the experts a task uses most, and nothing else: in each layer the best-scored ones until their scores sum to a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Esft {
    /// What is counted.
    pub score: EsftScore,
    /// The threshold p, in (0, 1]; the expert that crosses it is trained, too. The paper takes 0.2 for tokens and 0.1 for gates.
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

/// Use of the experts of each MoE layer, on some tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertUse {
    layers: BTreeMap<usize, LayerUse>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct LayerUse {
    tokens: u64,
    slots: u64,
    weights: Vec<f64>,
    selected: Vec<u64>,
}

impl ExpertUse {
    /// Runs `waves` through a model and counts.
    ///
    /// # Errors
    /// What stops the model; [`Error::Input`] for no waves.
    pub fn collect(model: &Model, waves: &[Wave]) -> Result<Self> {
        if waves.is_empty() {
            return Err(Error::input("waves to count the use of experts on", 0, "at least one"));
        }
        let mut counts = Self::default();
        let engine = Engine::new(model, EngineOptions::default());
        for wave in waves {
            engine.run(wave, &mut counts)?;
        }
        Ok(counts)
    }

    /// Scores of the experts of a layer.
    pub fn scores(&self, layer: usize, score: EsftScore) -> Option<Vec<f64>> {
        let counted = self.layers.get(&layer)?;
        Some(match score {
            EsftScore::Gate => counted.weights.iter().map(|sum| sum / counted.tokens.max(1) as f64).collect(),
            EsftScore::Token => counted.selected.iter().map(|n| *n as f64 / counted.slots.max(1) as f64).collect(),
        })
    }

    /// The layers, in order.
    pub fn layers(&self) -> impl Iterator<Item = usize> {
        self.layers.keys().copied()
    }
}

impl Observer for ExpertUse {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let counted = self.layers.entry(trace.layer).or_default();
        counted.weights.resize(trace.experts, 0.0);
        counted.selected.resize(trace.experts, 0);
        counted.tokens += trace.wave.tokens as u64;
        counted.slots += trace.selected.len() as u64;
        for (&expert, &weight) in trace.selected.iter().zip(trace.weights) {
            counted.weights[expert as usize] += f64::from(weight);
            counted.selected[expert as usize] += 1;
        }
        Ok(())
    }
}

/// Experts in the order in which they are taken, until their scores sum to `threshold`: the highest first, the lower index on a tie, none
/// without a score.
pub fn experts_to(scores: &[f64], threshold: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).filter(|e| scores[*e] > 0.0).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let mut sum = 0.0;
    order
        .into_iter()
        .take_while(|e| {
            let before = sum;
            sum += scores[*e];
            before < threshold
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

    /// The experts of each layer.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn select(&self, counted: &ExpertUse) -> Result<EsftSelection> {
        self.validate()?;
        let layer = |layer| (layer, experts_to(&counted.scores(layer, self.score).unwrap_or_default(), self.threshold));
        Ok(EsftSelection {
            experts: counted.layers().map(layer).collect(),
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
    fn counts_are_means_over_tokens_and_selections() {
        let counted = LayerUse { tokens: 4, slots: 8, weights: vec![2.0, 1.0, 0.0], selected: vec![4, 3, 1] };
        let counted = ExpertUse { layers: [(1, counted)].into() };
        assert_eq!(counted.scores(1, EsftScore::Gate).unwrap(), [0.5, 0.25, 0.0]);
        assert_eq!(counted.scores(1, EsftScore::Token).unwrap(), [0.5, 0.375, 0.125]);
        assert_eq!(counted.scores(0, EsftScore::Gate), None);
        let selection = Esft { threshold: 0.6, ..Esft::default() }.select(&counted).unwrap();
        let json = serde_json::to_string(&selection).unwrap();
        assert_eq!(json, r#"{"experts":{"1":[0,1]},"shared_experts":false,"non_expert_modules":false}"#);
        assert_eq!(serde_json::from_str::<EsftSelection>(&json).unwrap(), selection);
        let weights = selection.weights();
        assert_eq!(weights.only, Some([(1, [0, 1].into())].into()));
        assert!(weights.experts && !weights.attention && !weights.router);
        assert!(Esft { threshold: 0.0, ..Esft::default() }.select(&ExpertUse::default()).is_err());
    }
}
