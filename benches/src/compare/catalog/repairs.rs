//! Repairs.

use moe_peft::Recipe;
use moe_prune::repair::{LayerRefit, MeanOutput, Refit, RouterDistillation};
use serde::Deserialize;

use super::{Line, line, names};
use crate::{Error, Result};

/// The repair of configurations that are measured as pruned.
pub const NO_REPAIR: &str = "none";

/// All repairs: on which rows, and steps that follow each other.
#[rustfmt::skip]
pub const REPAIRS: &[Line] = &[
    line(NO_REPAIR, r#"{"steps": []}"#),
    line("mean_output", r#"{"steps": [{"type": "mean_output"}]}"#),
    line("refit_own", r#"{"steps": [{"type": "refit"}]}"#),
    line("refit", r#"{"steps": [{"type": "layer_refit"}]}"#),
    line("refit_0.01", r#"{"steps": [{"type": "layer_refit", "ridge": 0.01}]}"#),
    line("refit_1", r#"{"steps": [{"type": "layer_refit", "ridge": 1}]}"#),
    line("refit_all", r#"{"rows": "all", "steps": [{"type": "layer_refit"}]}"#),
    line("refit_mixed", r#"{"rows": "mixed", "steps": [{"type": "layer_refit"}]}"#),
    line("router_kd", r#"{"steps": [{"type": "router_distillation", "train": {"epochs": 6}}]}"#),
    line("router_kd_all", r#"{"rows": "all", "steps": [{"type": "router_distillation", "train": {"epochs": 6}}]}"#),
    line("refit_router_kd", r#"{"steps": [{"type": "layer_refit"}, {"type": "router_distillation", "train": {"epochs": 6}}]}"#),
    line("recovery", r#"{"steps": [{"type": "tune", "step_tokens": 512, "recipe": {"method": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear", "modules_to_save": ["mlp.gate"]}, "train": {"max_steps": 30, "epochs": 30, "evaluate_every": null, "keep": "last", "schedule": {"peak": 0.002, "warmup": 0.1, "decay": "cosine", "final_share": 0.1}}}}]}"#),
    line("router_kd_refit", r#"{"steps": [{"type": "router_distillation", "train": {"epochs": 6}}, {"type": "layer_refit"}]}"#),
];

/// Rows that a repair runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RepairRows {
    /// Those that were scored on.
    #[default]
    Draw,
    /// All calibration rows of the capability.
    All,
    /// Those that were scored on for each capability, together.
    Mixed,
}

/// A repair.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repair {
    /// The rows.
    #[serde(default)]
    pub rows: RepairRows,
    /// What is done, one after the other.
    pub steps: Vec<RepairStep>,
}

/// A step of a repair.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RepairStep {
    /// Kept down columns of a layer together, so that the layer gives what the full model's gives.
    LayerRefit(LayerRefit),
    /// Kept down columns of every expert for itself.
    Refit(Refit),
    /// A bias per expert.
    MeanOutput(MeanOutput),
    /// The routers, by gradient descent.
    RouterDistillation(Box<RouterDistillation>),
    /// What a recipe of fine-tuning trains, on the rows themselves, folded into the weights.
    Tune(Box<Tuning>),
}

/// A fine-tuning of what is left.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// What is trained, and how.
    pub recipe: Recipe,
    /// Tokens of a step.
    pub step_tokens: usize,
}

/// Reads a repair: its name in [`REPAIRS`], or as JSON. Names and JSON with `+` between them follow each other, on the
/// rows of the first.
///
/// # Errors
/// [`Error::Usage`] that says what there is.
pub fn repair(text: &str) -> Result<Repair> {
    if let Some((first, then)) = text.split_once('+').filter(|(first, _)| !first.contains('{')) {
        let mut whole = repair(first)?;
        whole.steps.extend(repair(then)?.steps);
        return Ok(whole);
    }
    let json = REPAIRS.iter().find(|line| line.name == text).map_or(text, |line| line.json);
    serde_json::from_str(json).map_err(|error| {
        let known = names(REPAIRS.iter().map(|line| line.name));
        Error::Usage(format!("repair {text}: {error}; the study has {known}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_repair_can_be_read() {
        let steps: Vec<usize> = REPAIRS.iter().map(|line| repair(line.name).unwrap().steps.len()).collect();
        assert_eq!(steps, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 2]);
        let RepairStep::LayerRefit(refit) = repair("refit_0.01").unwrap().steps[0] else { panic!("another repair") };
        assert_eq!((refit.ridge, refit.sweeps), (0.01, LayerRefit::default().sweeps));
        assert_eq!(repair("refit_mixed").unwrap().rows, RepairRows::Mixed);
        let steps = repair("mean_output+refit").unwrap().steps;
        assert!(matches!(steps[..], [RepairStep::MeanOutput(_), RepairStep::LayerRefit(_)]), "{steps:?}");
        assert!(repair("prayer").unwrap_err().to_string().contains("none, mean_output, refit_own"));
    }
}
