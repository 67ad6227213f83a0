//! A plan as an overlay: the pruned model without a pruned checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Dtype, ExpertPart, ExpertWeights, LayerRole, RawMatrix, Role, encode};
use moe_core::{ExpertOverlay, KeepUnits, Model, RoutingOverlay};

use crate::plan::LayerKept;
use crate::{EditSource, Error, PrunePlan, Result};

/// Shows a model as a plan leaves it, edits included: dropped units are gone, removed experts cannot be routed to, experts
/// without units give nothing but their bias. Evaluates as the checkpoint that the plan is applied to does, up to the rounding
/// of other matrix kernels.
///
/// ```no_run
/// use moe_core::{Model, device::device};
/// use moe_prune::{PlanOverlay, PrunePlan};
///
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let pruned = PlanOverlay::new(&PrunePlan::load("plan.json")?).of(&model)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct PlanOverlay {
    units: KeepUnits,
    removed: BTreeMap<usize, Vec<u32>>,
    routers: BTreeMap<usize, Vec<f32>>,
    edits: Option<(Arc<dyn EditSource>, Arc<Checkpoint>)>,
}

impl std::fmt::Debug for PlanOverlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { removed, edits, .. } = self;
        f.debug_struct("PlanOverlay").field("removed", removed).field("edits", &edits.is_some()).finish_non_exhaustive()
    }
}

impl PlanOverlay {
    /// The overlay of a plan.
    pub fn new(plan: &PrunePlan) -> Self {
        Self::of_layers(&plan.kept)
    }

    /// The overlay that keeps this of the MoE layers it names, and all of the others.
    pub fn of_layers(kept: &[LayerKept]) -> Self {
        let mut units = KeepUnits::new();
        for layer in kept {
            for (expert, kept) in layer.experts.iter().enumerate() {
                units = units.keep(layer.layer, expert, kept.as_slice());
            }
        }
        let removed = kept.iter().filter(|layer| !layer.removed.is_empty());
        let removed = removed.map(|layer| (layer.layer, layer.removed.clone())).collect();
        Self { units, removed, routers: BTreeMap::new(), edits: None }
    }

    /// The overlay of a plan and what a repair changes beside it, in the dtypes that `checkpoint` would store it in.
    ///
    /// # Errors
    /// [`Error::InvalidEdits`] for edits of another plan, values that cannot be read.
    pub fn with_edits(plan: &PrunePlan, edits: Arc<dyn EditSource>, checkpoint: &Arc<Checkpoint>) -> Result<Self> {
        plan.validate(checkpoint.shape())?;
        plan.validate_edits(&*edits)?;
        let mut overlay = Self::new(plan);
        for kept in &plan.kept {
            let Some(weight) = edits.router(kept.layer)? else { continue };
            let role = Role::Layer(kept.layer, LayerRole::Router);
            let dtype = checkpoint.plain_dtype(&checkpoint.role(role)?.name)?;
            overlay.routers.insert(kept.layer, stored(weight, dtype));
        }
        overlay.edits = Some((edits, checkpoint.clone()));
        Ok(overlay)
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

/// Values as they come back from a file of this dtype.
fn stored(values: Vec<f32>, dtype: Dtype) -> Vec<f32> {
    let mut bytes = Vec::new();
    if !encode(dtype, &values, &mut bytes) {
        return values;
    }
    RawMatrix { bytes: bytes.into(), dtype, rows: 1, cols: values.len() }.to_f32()
}

impl ExpertOverlay for PlanOverlay {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        let mut weights = self.units.apply(layer, expert, weights)?;
        let Some((edits, checkpoint)) = &self.edits else { return Ok(weights) };
        let edit = edits.expert(layer, expert).map_err(moe_core::Error::observer)?.unwrap_or_default();
        if edit.is_empty() {
            return Ok(weights);
        }
        let down = checkpoint.expert_dtype(layer, expert, ExpertPart::Down)?.unwrap_or(Dtype::F32);
        if let Some(values) = edit.down {
            if values.len() != weights.hidden * weights.width {
                let (found, expected) = (values.len(), weights.hidden * weights.width);
                let reason = format!("layer {layer}, expert {expert}: down has {found} values, expected {expected}");
                return Err(moe_core::Error::observer(Error::invalid_edits(reason)));
            }
            weights.down = stored(values, down);
        }
        if let Some(values) = edit.down_bias {
            let dtype = checkpoint.expert_dtype(layer, expert, ExpertPart::DownBias)?.unwrap_or(down);
            weights.down_bias = Some(stored(values, dtype));
        }
        Ok(weights)
    }
}

impl RoutingOverlay for PlanOverlay {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        self.removed.get(&layer).map(Vec::as_slice)
    }

    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.routers.get(&layer).cloned()
    }
}
