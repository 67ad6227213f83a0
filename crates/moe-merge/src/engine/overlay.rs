//! A merged layer in the place of the model's own while a sweep goes on.

use std::path::PathBuf;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertWeights, LayerRole, decode_f32};
use moe_core::{ExpertOverlay, LayerChange, RoutingOverlay};

use crate::combination::Merged;
use crate::merged::router_rows;
use crate::merged::weights::{LayerRecord, read_group};
use crate::router::{RouterConfig, RouterMix, RouterRule};
use crate::{Error, Result};

/// Shows one layer as a merge leaves it: experts of a group are the merged one, experts whose router rows go cannot be
/// routed to, the others' rows and biases are the mixed ones.
pub(super) struct LayerOverlay {
    dir: PathBuf,
    checkpoint: Arc<Checkpoint>,
    record: LayerRecord,
    /// Position of the group of every expert that can be routed to.
    groups: Vec<Option<u32>>,
    removed: Vec<u32>,
    /// Weight, bias and correction bias of the router, as far as there are any and they change.
    router: [Option<Vec<f32>>; 3],
}

impl LayerOverlay {
    /// What became of a layer, from the files in `dir`.
    pub fn new(dir: PathBuf, checkpoint: &Arc<Checkpoint>, record: LayerRecord, rule: RouterConfig) -> Result<Self> {
        let (plan, layer) = (&record.plan, record.plan.layer);
        let experts = checkpoint.config().moe(layer).map_or(0, |moe| moe.num_experts());
        let mut groups = plan.index_map(experts);
        let (mut removed, mut router) = (Vec::new(), [None, None, None]);
        if let Some(mut mix) = rule.mix(plan).filter(|_| !plan.is_identity()) {
            mix.add(&record.additions());
            removed = plan.removed(experts);
            groups = vec![None; experts];
            for (position, group) in plan.groups.iter().enumerate() {
                groups[group.dominant as usize] = Some(position as u32);
            }
            for (values, role) in router.iter_mut().zip(router_rows::ROLES) {
                *values = rows_in_place(checkpoint, &record, role, &mix)?;
            }
        }
        Ok(Self { dir, checkpoint: checkpoint.clone(), record, groups, removed, router })
    }

    /// The change of a layer-by-layer sweep.
    pub fn change(self) -> LayerChange {
        let overlay = Arc::new(self);
        LayerChange { experts: Some(overlay.clone()), routing: Some(overlay) }
    }

    fn router(&self, layer: usize, role: LayerRole) -> Option<Vec<f32>> {
        let at = router_rows::ROLES.iter().position(|found| *found == role)?;
        self.router[at].clone().filter(|_| layer == self.record.plan.layer)
    }
}

/// A tensor of a router with each group's mixed row in the place of its dominant's; `None` if there is no such tensor.
fn rows_in_place(
    checkpoint: &Checkpoint,
    record: &LayerRecord,
    role: LayerRole,
    mix: &RouterMix,
) -> Result<Option<Vec<f32>>> {
    let layer = record.plan.layer;
    let Some((bytes, dtype)) = router_rows::mixed(checkpoint, layer, role, mix)? else { return Ok(None) };
    let mut mixed = Vec::new();
    if !decode_f32(dtype, &bytes, &mut mixed) {
        return Err(Error::numerics(format!("layer {layer}: {role}"), format!("{dtype} cannot be read")));
    }
    let mut rows = checkpoint.read_f32(moe_checkpoint::Role::Layer(layer, role))?;
    let all = checkpoint.config().moe(layer).map_or(1, |moe| moe.router_rows());
    let length = rows.len() / all.max(1);
    for (group, row) in record.plan.groups.iter().zip(mixed.chunks_exact(length.max(1))) {
        let start = group.dominant as usize * length;
        rows[start..start + length].copy_from_slice(row);
    }
    Ok(Some(rows))
}

impl ExpertOverlay for LayerOverlay {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        if layer != self.record.plan.layer {
            return Ok(weights);
        }
        let Some(Some(group)) = self.groups.get(expert) else { return Ok(weights) };
        match read_group(&self.dir, &self.record, *group as usize).map_err(moe_core::Error::observer)? {
            Merged::Unchanged(same) if same == expert => Ok(weights),
            Merged::Unchanged(other) => Ok(self.checkpoint.expert(layer, other)?),
            Merged::Changed(merged) => Ok(*merged),
        }
    }
}

impl RoutingOverlay for LayerOverlay {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        (layer == self.record.plan.layer && !self.removed.is_empty()).then_some(self.removed.as_slice())
    }

    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.router(layer, LayerRole::Router)
    }

    fn router_bias(&self, layer: usize) -> Option<Vec<f32>> {
        self.router(layer, LayerRole::RouterBias)
    }

    fn selection_bias(&self, layer: usize) -> Option<Vec<f32>> {
        self.router(layer, LayerRole::CorrectionBias)
    }
}
