//! Ways to prune.

use moe_checkpoint::{Granularity, Routing};
use moe_prune::PrunerConfig;
use serde::Deserialize;
use serde_json::Value;

use super::{Line, MERGES, Merge, line, names};
use crate::{Error, Result};

/// Every expert drops the same fraction of its units: one width, which stock loaders read.
pub const UNIFORM: &str = "uniform";
/// Units of a layer compete.
pub const LAYER: &str = "layer";
/// Units of the model compete.
pub const GLOBAL: &str = "global";
/// Whole experts go with their rows of the router, as many in each layer.
pub const EXPERTS: &str = "experts";

/// Whichever form that stock loaders read stays closest to the full model: one width, or pieces.
pub const STOCK_AUTO: &str = "auto";

/// The ways to prune that every scorer is tried with.
pub const GRID: [&str; 4] = [UNIFORM, LAYER, GLOBAL, EXPERTS];

/// All ways to prune. Widths may be any number, so that all of them meet the budget to the unit.
#[rustfmt::skip]
pub const METHODS: &[Line] = &[
    line(UNIFORM, r#"{"type": "unit", "allocator": {"type": "uniform"}}"#),
    line(LAYER, r#"{"type": "unit", "allocator": {"type": "layer"}}"#),
    line(GLOBAL, r#"{"type": "unit", "allocator": {"type": "global"}}"#),
    line(EXPERTS, r#"{"type": "expert"}"#),
    line("lamp", r#"{"type": "unit", "allocator": {"type": "normalized", "by": "lamp_of_squares"}}"#),
    line("coverage", r#"{"type": "unit", "allocator": {"type": "normalized", "by": "coverage"}}"#),
    line("hybrid", r#"{"type": "unit", "allocator": {"type": "hybrid", "guaranteed": 0.8}}"#),
    line("depth_rising", r#"{"type": "unit", "allocator": {"type": "depth_prior", "prior": {"linear": {"first": 0.75, "last": 1.25}}}}"#),
    line("depth_falling", r#"{"type": "unit", "allocator": {"type": "depth_prior", "prior": {"linear": {"first": 1.25, "last": 0.75}}}}"#),
    line("dp_scores", r#"{"type": "unit", "allocator": {"type": "rate_distortion"}}"#),
    line("dp_measured", r#"{"type": "unit", "allocator": {"type": "rate_distortion", "curves": {"measured": {"points": 6}}}}"#),
    line("evolution", r#"{"type": "unit", "allocator": {"type": "evolution", "population": 8, "generations": 6}}"#),
    line("two_level", r#"{"type": "two_level"}"#),
    line("wide", r#"{"type": "wide"}"#),
    line("experts_global", r#"{"type": "expert", "allocator": {"type": "global"}}"#),
    line("experts_dp", r#"{"type": "expert", "allocator": {"type": "rate_distortion", "curves": {"layer_errors": {"points": 6}}}}"#),
    line("experts_evolution", r#"{"type": "expert", "allocator": {"type": "evolution", "population": 8, "generations": 6}}"#),
    line("experts_rco", r#"{"type": "expert", "allocator": {"type": "rco", "steps": 60, "samples": 2}}"#),
    line("experts_subset", r#"{"type": "subset", "limit": 100}"#),
    line("moe_i2", r#"{"type": "genetic"}"#),
    line("pieces4", r#"{"type": "pieces", "pieces": 4, "scaled": true}"#),
    line("pieces4_k10", r#"{"type": "pieces", "pieces": 4, "top_k": 10, "scaled": true}"#),
    line("pieces4_unscaled", r#"{"type": "pieces", "pieces": 4}"#),
    line("pieces2", r#"{"type": "pieces", "pieces": 2, "scaled": true}"#),
    line(STOCK_AUTO, r#"{"type": "stock"}"#),
    line("mone", r#"{"type": "novice"}"#),
    line("moe-slimming", r#"{"type": "unit", "allocator": {"type": "coverage", "min_units": 16}}"#),
    line("reap-sequential", r#"{"type": "merge", "recipe": "reap-sequential"}"#),
    line("mc-smoe-recovered", r#"{"type": "merge", "recipe": "mc-smoe", "trained": "task_and_teacher", "steps": 30}"#),
];

/// Ways to distribute the budget over units, compared with [`UNIFORM`], [`LAYER`] and [`GLOBAL`].
#[rustfmt::skip]
pub const UNIT_ALLOCATORS: &[&str] = &[
    "lamp", "coverage", "hybrid", "depth_rising", "depth_falling", "dp_scores", "dp_measured", "evolution", "two_level", "wide",
];

/// Ways to choose whole experts, compared with [`EXPERTS`].
pub const EXPERT_ALLOCATORS: &[&str] =
    &["experts_global", "experts_dp", "experts_evolution", "experts_rco", "experts_subset", "moe_i2"];

/// Exports that stock loaders read, and what they are compared with, each with a repair.
#[rustfmt::skip]
pub const STOCK: &[(&str, &str)] = &[
    (UNIFORM, "none"), (UNIFORM, "refit_own"), (UNIFORM, "refit"), (UNIFORM, "router_kd"),
    (EXPERTS, "none"), (EXPERTS, "refit"),
    ("pieces2", "none"),
    ("pieces4_unscaled", "none"),
    ("pieces4_k10", "none"), ("pieces4_k10", "refit"),
    ("pieces4", "none"), ("pieces4", "refit"), ("pieces4", "refit_0.01"), ("pieces4", "refit_mixed"),
    ("pieces4", "router_kd"), ("pieces4", "router_kd_all"), ("pieces4", "router_kd_refit"),
    (LAYER, "none"), (LAYER, "refit"),
    (GLOBAL, "none"), (GLOBAL, "refit"),
];

/// Scorers that [`STOCK_OF_SCORERS`] are compared with, besides the main one.
pub const STOCK_SCORERS: &[&str] =
    &["fisher_answers", "coupled_answers", "taylor_answers", "activation_weighted", "heapr_all"];

/// The exports and repairs whose scorer matters, and what they are compared with.
#[rustfmt::skip]
pub const STOCK_OF_SCORERS: &[(&str, &str)] = &[
    (UNIFORM, "none"), (UNIFORM, "refit"), ("pieces4", "none"), ("pieces4", "refit"), (GLOBAL, "none"),
];

/// A way to prune.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// By a pruner: the checkpoint in ragged or uniform widths.
    Pruner(PrunerConfig),
    /// As equal pieces: a checkpoint for stock loaders.
    Pieces(Pieces),
    /// In the form that stock loaders read and that stays closest to the full model.
    Stock,
    /// Experts that become one.
    Merge(Merge),
}

/// Experts cut into pieces of one width, of which the best of every layer stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pieces {
    /// Pieces of a whole expert.
    pub pieces: usize,
    /// Pieces per token; as many as the experts that a token had were made of, if not given.
    #[serde(default)]
    pub top_k: Option<usize>,
    /// Whether a factor for every expert is calibrated.
    #[serde(default)]
    pub scaled: bool,
}

impl Method {
    /// What it reads: scores of units, or of experts.
    pub fn reads(&self) -> Granularity {
        match self {
            Self::Pruner(
                PrunerConfig::Expert(_) | PrunerConfig::Novice(_) | PrunerConfig::Subset(_) | PrunerConfig::Genetic(_),
            )
            | Self::Merge(_) => Granularity::Expert,
            _ => Granularity::Unit,
        }
    }

    /// The same with as many experts left in every group of experts that this routing selects.
    pub fn for_routing(self, routing: &Routing) -> Self {
        match self {
            Self::Pruner(PrunerConfig::Expert(pruner)) => {
                Self::Pruner(PrunerConfig::Expert(pruner.for_routing(routing)))
            }
            Self::Pruner(PrunerConfig::Subset(pruner)) => {
                Self::Pruner(PrunerConfig::Subset(pruner.for_routing(routing)))
            }
            Self::Pruner(PrunerConfig::Genetic(pruner)) => {
                Self::Pruner(PrunerConfig::Genetic(pruner.for_routing(routing)))
            }
            other => other,
        }
    }
}

/// Reads a way to prune or to merge: its name in [`METHODS`] or [`MERGES`], or as JSON.
///
/// # Errors
/// [`Error::Usage`] that says what there is.
pub fn method(text: &str) -> Result<Method> {
    let lines = || METHODS.iter().chain(MERGES);
    let json = lines().find(|line| line.name == text).map_or(text, |line| line.json);
    parse(json).map_err(|error| {
        let known = names(lines().map(|line| line.name));
        Error::Usage(format!("--pruner {text}: {error}; the study has {known}"))
    })
}

/// No field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

fn parse(json: &str) -> serde_json::Result<Method> {
    let mut value: Value = serde_json::from_str(json)?;
    let kind = value.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !["pieces", "merge", "stock"].contains(&kind.as_str()) {
        return Ok(Method::Pruner(serde_json::from_value(value)?));
    }
    if let Some(fields) = value.as_object_mut() {
        fields.remove("type");
    }
    Ok(match kind.as_str() {
        "stock" => serde_json::from_value::<Empty>(value).map(|_| Method::Stock)?,
        "pieces" => Method::Pieces(serde_json::from_value(value)?),
        _ => Method::Merge(serde_json::from_value(value)?),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_line_can_be_read_and_has_a_name_of_its_own() {
        let names: BTreeSet<_> = METHODS.iter().chain(MERGES).map(|line| line.name).collect();
        assert_eq!(names.len(), METHODS.len() + MERGES.len());
        for line in METHODS.iter().chain(MERGES) {
            method(line.name).unwrap_or_else(|error| panic!("{}: {error}", line.name));
        }
        for name in GRID.iter().chain(UNIT_ALLOCATORS).chain(EXPERT_ALLOCATORS) {
            assert!(names.contains(name), "{name}");
        }
        for (name, repair) in STOCK.iter().chain(STOCK_OF_SCORERS) {
            assert!(names.contains(name), "{name}");
            super::super::repair(repair).unwrap();
        }
    }

    #[test]
    fn what_a_way_reads_is_known_and_what_is_not_there_is_said() {
        assert_eq!(method(EXPERTS).unwrap().reads(), Granularity::Expert);
        assert_eq!(method(GLOBAL).unwrap().reads(), Granularity::Unit);
        let pieces = Pieces { pieces: 4, top_k: Some(10), scaled: true };
        assert_eq!(method("pieces4_k10").unwrap(), Method::Pieces(pieces));
        assert!(method("all").unwrap_err().to_string().contains("uniform, layer, global"));
        assert!(method(r#"{"type": "pieces", "pieces": 4, "topk": 1}"#).unwrap_err().to_string().contains("topk"));
    }
}
