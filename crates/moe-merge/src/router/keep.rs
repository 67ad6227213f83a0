//! All rows stay.

use super::{RouterMix, RouterRule};
use crate::plan::LayerPlan;

/// All E rows stay; members share one set of weights. A token that selects two members gets that expert with the sum of
/// both weights, as M-SMoE (arXiv 2310.01334) and HC-SMoE (arXiv 2410.08589) have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep;

impl RouterRule for Keep {
    fn mix(&self, _: &LayerPlan) -> Option<RouterMix> {
        None
    }
}
