//! Repairs.

use moe_prune::repair::{LayerRefit, MeanOutput, Refit, RouterDistillation};
use serde::Deserialize;

use super::{Line, line, names};
use crate::{Error, Result};

/// The repair of configurations that are measured as pruned.
pub const NO_REPAIR: &str = "none";

/// All repairs: steps that follow each other.
#[rustfmt::skip]
pub const REPAIRS: &[Line] = &[
    line(NO_REPAIR, "[]"),
    line("refit", r#"[{"repair": "layer_refit"}]"#),
    line("refit_0.1", r#"[{"repair": "layer_refit", "ridge": 0.1}]"#),
    line("refit_own", r#"[{"repair": "refit"}]"#),
    line("mean_output", r#"[{"repair": "mean_output"}]"#),
    line("router_kd", r#"[{"repair": "router_distillation", "train": {"epochs": 6}}]"#),
    line("refit_router_kd", r#"[{"repair": "layer_refit"}, {"repair": "router_distillation", "train": {"epochs": 6}}]"#),
];

/// A step of a repair.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(tag = "repair", rename_all = "snake_case")]
pub enum Repair {
    /// Kept down columns of a layer together, so that the layer gives what the full model's gives.
    LayerRefit(LayerRefit),
    /// Kept down columns of every expert for itself.
    Refit(Refit),
    /// A bias per expert.
    MeanOutput(MeanOutput),
    /// The routers, by gradient descent.
    RouterDistillation(RouterDistillation),
}

/// Reads a repair: its name in [`REPAIRS`], or a list of steps as JSON.
///
/// # Errors
/// [`Error::Usage`] that says what there is.
pub fn repair(text: &str) -> Result<Vec<Repair>> {
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
        let steps: Vec<usize> = REPAIRS.iter().map(|line| repair(line.name).unwrap().len()).collect();
        assert_eq!(steps, [0, 1, 1, 1, 1, 1, 2]);
        let Repair::LayerRefit(refit) = repair("refit_0.1").unwrap()[0] else { panic!("another repair") };
        assert_eq!((refit.ridge, refit.sweeps), (0.1, LayerRefit::default().sweeps));
        assert!(repair("prayer").unwrap_err().to_string().contains("none, refit, refit_0.1"));
    }
}
