//! Scorers.

use moe_checkpoint::{Granularity, Reduction};
use moe_importance::ScorerConfig;
use moe_importance::scorers::{Magnitude, Random};

use super::names;
use crate::{Error, Result};

/// A scorer of the study.
#[derive(Clone, Copy, Debug)]
pub struct ScorerLine {
    /// Its name in tables and files.
    pub name: &'static str,
    /// What it is, as recipes have it.
    pub json: &'static str,
    /// Whether only the completions of calibration rows count in the loss, rather than their prompts as well.
    pub answers: bool,
}

const fn all(name: &'static str, json: &'static str) -> ScorerLine {
    ScorerLine { name, json, answers: false }
}

const fn answers(name: &'static str, json: &'static str) -> ScorerLine {
    ScorerLine { name, json, answers: true }
}

/// The scorer that allocators, repairs and exports are compared with.
pub const MAIN_SCORER: &str = "fisher";

/// Scorers that are always in the tables, whatever they are worth.
pub const CONTROLS: [&str; 3] = ["random", "frequency", "magnitude"];

/// All scorers, units first. `random` draws anew for each draw of the calibration rows.
#[rustfmt::skip]
pub const SCORERS: &[ScorerLine] = &[
    all(MAIN_SCORER, r#"{"type": "fisher", "criterion": "token"}"#),
    all("fisher_sequence", r#"{"type": "fisher", "criterion": "sequence"}"#),
    all("fisher_abs", r#"{"type": "fisher", "criterion": "abs"}"#),
    all("heapr", r#"{"type": "heapr"}"#),
    all("heapr_all", r#"{"type": "heapr", "denominator": "all_tokens"}"#),
    all("coupled", r#"{"type": "coupled"}"#),
    all("coupled_routed", r#"{"type": "coupled", "denominator": "routed_tokens"}"#),
    all("taylor", r#"{"type": "taylor"}"#),
    all("taylor_sum", r#"{"type": "taylor", "form": "sum"}"#),
    all("activation", r#"{"type": "activation"}"#),
    all("activation_weighted", r#"{"type": "activation", "weighting": "weight"}"#),
    all("projection", r#"{"type": "projection"}"#),
    answers("fisher_answers", r#"{"type": "fisher", "criterion": "token"}"#),
    answers("coupled_answers", r#"{"type": "coupled"}"#),
    answers("taylor_answers", r#"{"type": "taylor"}"#),
    all("magnitude", r#"{"type": "magnitude"}"#),
    all("router_score", r#"{"type": "router_score"}"#),
    all("random", r#"{"type": "random"}"#),
    all("frequency", r#"{"type": "frequency"}"#),
    all("routing_weight", r#"{"type": "routing_weight"}"#),
    all("ean_sum", r#"{"type": "ean"}"#),
    all("ean_mean", r#"{"type": "ean", "denominator": "routed_tokens"}"#),
    all("reap", r#"{"type": "reap"}"#),
    all("reap_renormalized", r#"{"type": "reap", "gate": "renormalized"}"#),
    all("reap_squared_gate", r#"{"type": "reap", "power": 2}"#),
    all("reap_sum", r#"{"type": "reap", "denominator": "all_tokens"}"#),
    all("man", r#"{"type": "man"}"#),
    all("msan", r#"{"type": "man", "squared": true}"#),
    all("seer", r#"{"type": "seer"}"#),
    all("aimer", r#"{"type": "aimer"}"#),
    all("expert_magnitude", r#"{"type": "expert_magnitude"}"#),
    all("router_taylor", r#"{"type": "router_taylor"}"#),
    all("router_fisher", r#"{"type": "router_taylor", "form": "square"}"#),
    all("tenp", r#"{"type": "tenp"}"#),
    all("dern", r#"{"type": "dern"}"#),
    all("esft", r#"{"type": "esft", "score": "gate"}"#),
    all("mone", r#"{"type": "mone"}"#),
    all("bias", r#"{"type": "bias"}"#),
];

/// Reads a scorer: its name in [`SCORERS`], its own name, or JSON.
///
/// # Errors
/// [`Error::Usage`] that says what there is.
pub fn scorer(text: &str) -> Result<ScorerConfig> {
    let line = SCORERS.iter().find(|line| line.name == text).map(|line| line.json.to_owned());
    let json = line.unwrap_or_else(|| match text.trim_start().starts_with('{') {
        true => text.to_owned(),
        false => serde_json::json!({ "type": text }).to_string(),
    });
    serde_json::from_str(&json).map_err(|error| {
        let known = names(SCORERS.iter().map(|line| line.name));
        Error::Usage(format!("--scorer {text}: {error}; the study has {known}"))
    })
}

/// A scorer as it scores units and as it scores experts.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// Scores units: an expert's score first, magnitude among the units of one expert.
    pub units: ScorerConfig,
    /// Scores experts: the sum over its units, or the mean of scores that do not add up.
    pub experts: ScorerConfig,
    /// What it scores by itself.
    pub own: Granularity,
}

impl Scoring {
    /// Of a scorer, with the random one drawing by `seed`.
    ///
    /// # Errors
    /// Parameters that do not go together.
    pub fn new(config: ScorerConfig, seed: u64) -> Result<Self> {
        let config = match config {
            ScorerConfig::Random(_) => Random::new(seed).into(),
            other => other,
        };
        let needs = config.build()?.needs();
        let units = config.clone().into_units(Magnitude::new())?;
        let reduction = if needs.additive.is_some() { Reduction::Sum } else { Reduction::Mean };
        Ok(Self { units, experts: config.into_experts(reduction)?, own: needs.granularity })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_line_can_be_read_and_has_a_name_of_its_own() {
        let names: BTreeSet<_> = SCORERS.iter().map(|line| line.name).collect();
        assert_eq!(names.len(), SCORERS.len());
        for line in SCORERS {
            Scoring::new(scorer(line.name).unwrap(), 0).unwrap_or_else(|error| panic!("{}: {error}", line.name));
        }
        assert!(CONTROLS.iter().chain([&MAIN_SCORER]).all(|name| names.contains(name)));
        assert!(scorer("fishing").unwrap_err().to_string().contains("fisher_sequence"));
    }

    #[test]
    fn random_draws_by_the_seed() {
        let seeded = |seed| Scoring::new(scorer("random").unwrap(), seed).unwrap().units;
        assert_ne!(seeded(0), seeded(1));
        assert_eq!(scorer("random").unwrap(), seeded(0));
    }
}
