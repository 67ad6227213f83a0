//! The lists of what is compared. A new method is a line here.

use moe_checkpoint::{Granularity, Pool, Reduction};
use moe_importance::ScorerConfig;
use moe_importance::scorers::{Magnitude, Random};
use moe_prune::PrunerConfig;

use crate::{Error, Result};

/// The repair of configurations that are measured as pruned.
pub const NO_REPAIR: &str = "none";

/// A scorer of the study.
#[derive(Clone, Copy, Debug)]
pub struct ScorerLine {
    /// Its name in tables and files.
    pub name: &'static str,
    /// What it is, as recipes have it.
    pub json: &'static str,
}

/// The scorer that allocators, repairs and exports are compared with.
pub const MAIN_SCORER: &str = "fisher";

/// Scorers that are always in the tables, whatever they are worth.
pub const CONTROLS: [&str; 3] = ["random", "frequency", "magnitude"];

/// All scorers, units first. `random` draws anew for each draw of the calibration rows.
#[rustfmt::skip]
pub const SCORERS: &[ScorerLine] = &[
    ScorerLine { name: MAIN_SCORER, json: r#"{"scorer": "fisher", "criterion": "token"}"# },
    ScorerLine { name: "fisher_sequence", json: r#"{"scorer": "fisher", "criterion": "sequence"}"# },
    ScorerLine { name: "fisher_abs", json: r#"{"scorer": "fisher", "criterion": "abs"}"# },
    ScorerLine { name: "heapr", json: r#"{"scorer": "heapr"}"# },
    ScorerLine { name: "heapr_all", json: r#"{"scorer": "heapr", "denominator": "all_tokens"}"# },
    ScorerLine { name: "coupled", json: r#"{"scorer": "coupled"}"# },
    ScorerLine { name: "coupled_routed", json: r#"{"scorer": "coupled", "denominator": "routed_tokens"}"# },
    ScorerLine { name: "taylor", json: r#"{"scorer": "taylor"}"# },
    ScorerLine { name: "taylor_sum", json: r#"{"scorer": "taylor", "form": "sum"}"# },
    ScorerLine { name: "activation", json: r#"{"scorer": "activation"}"# },
    ScorerLine { name: "activation_weighted", json: r#"{"scorer": "activation", "weighting": "weight"}"# },
    ScorerLine { name: "projection", json: r#"{"scorer": "projection"}"# },
    ScorerLine { name: "magnitude", json: r#"{"scorer": "magnitude"}"# },
    ScorerLine { name: "router_score", json: r#"{"scorer": "router_score"}"# },
    ScorerLine { name: "random", json: r#"{"scorer": "random"}"# },
    ScorerLine { name: "frequency", json: r#"{"scorer": "frequency"}"# },
    ScorerLine { name: "routing_weight", json: r#"{"scorer": "routing_weight"}"# },
    ScorerLine { name: "ean_sum", json: r#"{"scorer": "ean"}"# },
    ScorerLine { name: "ean_mean", json: r#"{"scorer": "ean", "denominator": "routed_tokens"}"# },
    ScorerLine { name: "reap", json: r#"{"scorer": "reap"}"# },
    ScorerLine { name: "reap_renormalised", json: r#"{"scorer": "reap", "gate": "renormalised"}"# },
    ScorerLine { name: "reap_squared_gate", json: r#"{"scorer": "reap", "power": 2}"# },
    ScorerLine { name: "reap_sum", json: r#"{"scorer": "reap", "denominator": "all_tokens"}"# },
    ScorerLine { name: "man", json: r#"{"scorer": "man"}"# },
    ScorerLine { name: "msan", json: r#"{"scorer": "man", "squared": true}"# },
    ScorerLine { name: "seer", json: r#"{"scorer": "seer"}"# },
    ScorerLine { name: "aimer", json: r#"{"scorer": "aimer"}"# },
    ScorerLine { name: "expert_magnitude", json: r#"{"scorer": "expert_magnitude"}"# },
    ScorerLine { name: "router_taylor", json: r#"{"scorer": "router_taylor"}"# },
    ScorerLine { name: "router_fisher", json: r#"{"scorer": "router_taylor", "form": "square"}"# },
    ScorerLine { name: "tenp", json: r#"{"scorer": "tenp"}"# },
    ScorerLine { name: "dern", json: r#"{"scorer": "dern"}"# },
    ScorerLine { name: "esft", json: r#"{"scorer": "esft"}"# },
    ScorerLine { name: "mone", json: r#"{"scorer": "mone"}"# },
    ScorerLine { name: "bias", json: r#"{"scorer": "bias"}"# },
];

/// Reads a scorer: its name in [`SCORERS`], its own name, or JSON.
///
/// # Errors
/// [`Error::Usage`] that says what there is.
pub fn scorer(text: &str) -> Result<ScorerConfig> {
    let line = SCORERS.iter().find(|line| line.name == text).map(|line| line.json.to_owned());
    let json = line.unwrap_or_else(|| match text.trim_start().starts_with('{') {
        true => text.to_owned(),
        false => serde_json::json!({ "scorer": text }).to_string(),
    });
    serde_json::from_str(&json).map_err(|error| {
        let names: Vec<_> = SCORERS.iter().map(|line| line.name).collect();
        Error::Usage(format!("--scorer {text}: {error}; the study has {}", names.join(", ")))
    })
}

/// A scorer as it scores units and as it scores experts.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// Scores units: an expert's score first, magnitude among the units of one expert.
    pub units: ScorerConfig,
    /// Scores experts: the sum over its units.
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
        let own = config.build()?.granularity();
        let units = config.clone().into_units(Magnitude::new())?;
        Ok(Self { units, experts: config.into_experts(Reduction::Sum)?, own })
    }
}

/// A way to prune.
#[derive(Clone, Copy, Debug)]
pub struct MethodLine {
    /// Its name in tables and files.
    pub name: &'static str,
    /// What it is, as recipes have it.
    pub json: &'static str,
}

/// Every expert drops the same fraction of its units.
pub const UNIFORM: &str = "uniform";
/// Units of a layer compete.
pub const LAYER: &str = "layer";
/// Units of the model compete.
pub const GLOBAL: &str = "global";
/// Whole experts go, as many in each layer.
pub const EXPERTS: &str = "experts";

/// The ways to prune that every scorer is tried with.
pub const GRID: [&str; 4] = [UNIFORM, LAYER, GLOBAL, EXPERTS];

/// All ways to prune. Widths may be any number, so that all of them meet the budget to the unit.
#[rustfmt::skip]
pub const METHODS: &[MethodLine] = &[
    MethodLine { name: UNIFORM, json: r#"{"type": "unit", "allocator": {"type": "uniform"}}"# },
    MethodLine { name: LAYER, json: r#"{"type": "unit", "allocator": {"type": "layer"}}"# },
    MethodLine { name: GLOBAL, json: r#"{"type": "unit", "allocator": {"type": "global"}}"# },
    MethodLine { name: EXPERTS, json: r#"{"type": "expert"}"# },
    MethodLine { name: "lamp", json: r#"{"type": "unit", "allocator": {"type": "normalised", "by": "lamp_of_squares"}}"# },
    MethodLine { name: "coverage", json: r#"{"type": "unit", "allocator": {"type": "normalised", "by": "coverage"}}"# },
    MethodLine { name: "hybrid", json: r#"{"type": "unit", "allocator": {"type": "hybrid"}}"# },
    MethodLine { name: "depth_rising", json: r#"{"type": "unit", "allocator": {"type": "depth_prior", "prior": {"linear": {"first": 0.75, "last": 1.25}}}}"# },
    MethodLine { name: "depth_falling", json: r#"{"type": "unit", "allocator": {"type": "depth_prior", "prior": {"linear": {"first": 1.25, "last": 0.75}}}}"# },
    MethodLine { name: "dp_scores", json: r#"{"type": "unit", "allocator": {"type": "rate_distortion"}}"# },
    MethodLine { name: "dp_measured", json: r#"{"type": "unit", "allocator": {"type": "rate_distortion", "curves": {"measured": {"points": 8}}}}"# },
    MethodLine { name: "evolution", json: r#"{"type": "unit", "allocator": {"type": "evolution", "population": 8, "generations": 8}}"# },
    MethodLine { name: "experts_global", json: r#"{"type": "expert", "allocator": {"type": "global"}}"# },
    MethodLine { name: "experts_dp_local", json: r#"{"type": "expert", "allocator": {"type": "rate_distortion", "curves": {"layer_errors": {"points": 6}}}}"# },
    MethodLine { name: "experts_evolution", json: r#"{"type": "expert", "allocator": {"type": "evolution", "population": 8, "generations": 8}}"# },
    MethodLine { name: "experts_rco", json: r#"{"type": "expert", "allocator": {"type": "rco", "steps": 60, "samples": 2}}"# },
    MethodLine { name: "experts_subset", json: r#"{"type": "subset", "limit": 200}"# },
    MethodLine { name: "two_level", json: r#"{"type": "two_level"}"# },
];

/// Ways to distribute the budget over units, compared with [`UNIFORM`], [`LAYER`] and [`GLOBAL`].
pub const UNIT_ALLOCATORS: &[&str] = &[
    "lamp",
    "coverage",
    "hybrid",
    "depth_rising",
    "depth_falling",
    "dp_scores",
    "dp_measured",
    "evolution",
    "two_level",
];
/// Ways to distribute the budget over whole experts, compared with [`EXPERTS`].
pub const EXPERT_ALLOCATORS: &[&str] =
    &["experts_global", "experts_dp_local", "experts_evolution", "experts_rco", "experts_subset"];

/// Reads a way to prune: its name in [`METHODS`], or a pruner as JSON.
///
/// # Errors
/// [`Error::Usage`] that says what there is.
pub fn method(text: &str) -> Result<PrunerConfig> {
    let json = METHODS.iter().find(|line| line.name == text).map_or(text, |line| line.json);
    serde_json::from_str(json).map_err(|error| {
        let names: Vec<_> = METHODS.iter().map(|line| line.name).collect();
        Error::Usage(format!("--pruner {text}: {error}; the study has {}", names.join(", ")))
    })
}

/// What a pruner reads: scores of units, or of experts.
pub fn reads(pruner: &PrunerConfig) -> Granularity {
    match pruner {
        PrunerConfig::Expert(_) | PrunerConfig::Novice(_) | PrunerConfig::Subset(_) => Granularity::Expert,
        _ => Granularity::Unit,
    }
}

/// How a pool is called.
pub fn pool_name(pool: Pool) -> &'static str {
    match pool {
        Pool::Expert => "an expert",
        Pool::Layer => "a layer",
        Pool::Global => "the model",
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
        let names: BTreeSet<_> = METHODS.iter().map(|line| line.name).collect();
        assert_eq!(names.len(), METHODS.len());
        METHODS.iter().for_each(|line| drop(method(line.name).unwrap()));
        for name in GRID.iter().chain(UNIT_ALLOCATORS).chain(EXPERT_ALLOCATORS) {
            assert!(names.contains(name), "{name}");
        }
        assert!(CONTROLS.iter().all(|name| SCORERS.iter().any(|line| line.name == *name)));
    }

    #[test]
    fn what_is_not_there_is_said() {
        assert!(scorer("fishing").unwrap_err().to_string().contains("fisher_sequence"));
        assert!(method("all").unwrap_err().to_string().contains("uniform, layer, global"));
        assert_eq!(reads(&method(EXPERTS).unwrap()), Granularity::Expert);
    }
}
