//! Only the rows of dominants stay.

use super::{RouterMix, RouterRule};
use crate::plan::LayerPlan;

/// Rows (and biases) of experts that are not dominant are deleted: tokens that selected them go to whoever comes next.
/// What REAM (arXiv 2604.04356) and DERN (arXiv 2509.10377) do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delete;

impl RouterRule for Delete {
    fn mix(&self, plan: &LayerPlan) -> Option<RouterMix> {
        let rows = plan.groups.iter().map(|group| vec![(group.dominant as usize, 1.0)]).collect();
        Some(RouterMix { rows, bias: vec![0.0; plan.groups.len()] })
    }
}
