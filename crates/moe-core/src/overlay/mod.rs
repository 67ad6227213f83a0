//! Running a model under changed experts ([`ExpertOverlay`]) and changed routing ([`RoutingOverlay`]) without writing a
//! checkpoint.

pub(crate) mod routing;
mod skip;
mod stacked;

use std::{collections::BTreeMap, sync::Arc};

use moe_checkpoint::ExpertWeights;

pub use routing::{
    ExpertGains, LogitTransform, RemoveExperts, RouterTokens, RoutingOverlay, RoutingRule, RuleGradients,
};
pub use skip::{SkipCalibration, SkipExperts};
pub use stacked::StackedRouting;

use crate::error::{Error, Result};

/// Changes the weights of routed experts as they are loaded: pruning plans, masks, merged experts, distortion curves.
///
/// The result may have another width (0 included); the hidden size must stay. Must be a pure function: an expert may be
/// loaded many times.
pub trait ExpertOverlay: Send + Sync {
    /// The weights that stand in for expert `expert` of decoder layer `layer`.
    ///
    /// # Errors
    /// Whatever makes the change impossible.
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> Result<ExpertWeights>;
}

/// Keeps some units of each expert and drops the others.
#[derive(Clone, Debug, Default)]
pub struct KeepUnits {
    kept: BTreeMap<(usize, usize), Arc<[u32]>>,
}

impl KeepUnits {
    /// Keeps everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps only `units` (ascending) of an expert.
    pub fn keep(mut self, layer: usize, expert: usize, units: impl Into<Arc<[u32]>>) -> Self {
        self.kept.insert((layer, expert), units.into());
        self
    }
}

impl ExpertOverlay for KeepUnits {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> Result<ExpertWeights> {
        let Some(units) = self.kept.get(&(layer, expert)) else { return Ok(weights) };
        let width = weights.width;
        if let Some(unit) = units.iter().find(|&&u| u as usize >= width) {
            return Err(Error::input(
                format!("kept unit of layer {layer} expert {expert}"),
                unit,
                format!("an index below the width {width}"),
            ));
        }
        Ok(weights.select_units(units)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_rows_of_gate_and_up_and_columns_of_down() {
        let weights = ExpertWeights {
            gate: vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            up: vec![10.0, 11.0, 12.0, 13.0, 14.0, 15.0],
            down: vec![20.0, 21.0, 22.0, 23.0, 24.0, 25.0],
            width: 3,
            hidden: 2,
            ..Default::default()
        };
        let overlay = KeepUnits::new().keep(1, 2, vec![0, 2]).keep(1, 3, vec![]).keep(1, 4, vec![3]);
        let kept = overlay.apply(1, 2, weights.clone()).unwrap();
        assert_eq!(
            (kept.gate, kept.up, kept.down, kept.width),
            (vec![0.0, 1.0, 4.0, 5.0], vec![10.0, 11.0, 14.0, 15.0], vec![20.0, 22.0, 23.0, 25.0], 2)
        );
        let empty = overlay.apply(1, 3, weights.clone()).unwrap();
        assert_eq!((empty.width, empty.down.len()), (0, 0));
        assert_eq!(overlay.apply(0, 2, weights.clone()).unwrap().gate, weights.gate);
        assert!(overlay.apply(1, 4, weights).unwrap_err().to_string().contains("layer 1 expert 4"));
    }
}
