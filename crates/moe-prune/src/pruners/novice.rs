//! Emptying experts that the router goes on choosing.

use moe_checkpoint::{ExpertId, Granularity, Pool, ScoreTable};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PruneRequest, Pruner};
use crate::allocators::{Allocator, AllocatorConfig, ExpertLimits, LayerAllocation, Limits, Uniform, sum_of_layers};
use crate::probe::ModelProbe;
use crate::recipe::tagged;
use crate::{Allocation, Needs, Result};

/// Experts that lose all their units but keep their row of the router, as in MoNE (arXiv 2507.00390): a token that is
/// routed to such a *novice* gets a constant instead. The plan says which; the constant (the expert's mean output over
/// its tokens) is a bias that a repair adds, and without it a novice gives nothing.
///
/// The router is kept in full, so that a layer may have nothing but novices, and groups do not matter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NovicePruner {
    /// How the budget is distributed: over layers, or over the model, as the source offers both.
    pub allocator: AllocatorConfig,
    /// As the released code compares: an expert must score strictly more than the best one that goes, so that all that
    /// tie with it go as well, and the budget may be missed on the small side.
    pub strict: bool,
}

impl Default for NovicePruner {
    /// The same number in every layer, ties settled by index.
    fn default() -> Self {
        Self { allocator: AllocatorConfig::Uniform(Uniform::default()), strict: false }
    }
}

impl Pruner for NovicePruner {
    fn recipe(&self) -> Value {
        tagged("novice", self)
    }

    fn needs(&self) -> Needs {
        self.allocator.needs(Granularity::Expert)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        let limits = Limits::Experts(ExpertLimits { keeps_router: true, ..ExpertLimits::default() });
        let allocation = self.allocator.allocate_with(&request.with_limits(limits), probe)?;
        if !self.strict {
            return Ok(allocation);
        }
        let pool = match self.allocator {
            AllocatorConfig::Global(_) => Pool::Global,
            _ => Pool::Layer,
        };
        let mut layers = allocation.layers.clone();
        drop_ties(&mut layers, request, pool);
        let predicted = sum_of_layers(request.scores, &layers);
        let allocation = Allocation { predicted, ..allocation };
        Ok(allocation.with_layers(layers, request.shape))
    }
}

/// Empties every unprotected expert that scores no more than the best one that is empty already.
fn drop_ties(layers: &mut [LayerAllocation], request: &PruneRequest<'_>, pool: Pool) {
    let score = |scores: &ScoreTable, layer: usize, expert: usize| f64::from(scores.layers[layer].scores[expert][0]);
    let highest = |layer: usize, found: &LayerAllocation| {
        let empty = (0..found.kept.len()).filter(|expert| found.kept[*expert].is_empty());
        empty.map(|expert| score(request.scores, layer, expert)).fold(f64::NEG_INFINITY, f64::max)
    };
    let thresholds: Vec<f64> = layers.iter().enumerate().map(|(layer, found)| highest(layer, found)).collect();
    let of_model = thresholds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for (layer, found) in layers.iter_mut().enumerate() {
        let threshold = if pool == Pool::Global { of_model } else { thresholds[layer] };
        for (expert, kept) in found.kept.iter_mut().enumerate() {
            let id = ExpertId { layer: found.layer, expert };
            let protected = request.protect.count(id.layer, id.expert, request.shape.layers[layer].widths[expert]) > 0;
            let value = score(request.scores, layer, expert);
            if !kept.is_empty() && !protected && value <= threshold {
                kept.clear();
                found.predicted = found.predicted.map(|sum| sum + value);
            }
        }
    }
}
