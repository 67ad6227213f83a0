//! Candidates of a search as an overlay: what is kept changes from one run to the next.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::{ExpertWeights, TopKClamp};
use moe_core::{ExpertOverlay, KeepUnits, Model, RoutingOverlay};

use crate::plan::LayerKept;
use crate::{PrunePlan, Result};

/// Shows a model with only this kept: dropped units are gone, removed experts cannot be routed to, experts without
/// units give nothing. For searches, which try one candidate after the other on a model that stays open; it evaluates
/// as [`PrunePlan::on`] does, up to the rounding of other matrix kernels.
///
/// ```no_run
/// use moe_core::{Model, device::device};
/// use moe_prune::{PlanOverlay, PrunePlan};
///
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let pruned = PlanOverlay::new(&PrunePlan::load("plan.json")?).of(&model)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct PlanOverlay {
    units: KeepUnits,
    removed: BTreeMap<usize, Vec<u32>>,
    top_k: Option<usize>,
}

impl PlanOverlay {
    /// The overlay of a plan.
    pub fn new(plan: &PrunePlan) -> Self {
        Self::of_layers(&plan.kept, plan.shape.top_k)
    }

    /// The overlay that keeps this of the MoE layers it names, and all of the others, of a model that selects `top_k`
    /// experts per token: fewer in all layers if one has fewer left, as the config of the pruned model says.
    pub fn of_layers(kept: &[LayerKept], top_k: usize) -> Self {
        let mut units = KeepUnits::new();
        for layer in kept {
            for (expert, kept) in layer.experts.iter().enumerate() {
                units = units.keep(layer.layer, expert, kept.as_slice());
            }
        }
        let removed = kept.iter().filter(|layer| !layer.removed.is_empty());
        let removed = removed.map(|layer| (layer.layer, layer.removed.clone())).collect();
        let left = kept.iter().map(|layer| layer.experts.len() - layer.removed.len());
        let top_k = TopKClamp::of(top_k, left).map(|clamp| clamp.after);
        Self { units, removed, top_k }
    }

    /// The model seen through this overlay; overlays that `model` has are not kept.
    ///
    /// # Errors
    /// Those of [`Model::with_overlays`].
    pub fn of(self, model: &Model) -> Result<Model> {
        let overlay = Arc::new(self);
        Ok(model.with_overlays(Some(overlay.clone()), Some(overlay))?)
    }
}

impl ExpertOverlay for PlanOverlay {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        self.units.apply(layer, expert, weights)
    }
}

impl RoutingOverlay for PlanOverlay {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        self.removed.get(&layer).map(Vec::as_slice)
    }

    fn top_k(&self) -> Option<usize> {
        self.top_k
    }
}
