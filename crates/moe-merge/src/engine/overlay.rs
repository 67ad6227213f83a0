//! A merge as an overlay: the merged model without a merged checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Dtype, ExpertWeights, LayerRole, RawMatrix, Role, encode};
use moe_core::{ExpertOverlay, LayerChange, Model, RoutingOverlay};

use crate::apply::merged_dir::{LayerRecord, MergedWeights, read_group};
use crate::combination::Merged;
use crate::router::{RouterConfig, RouterRule};
use crate::{Error, Result};

/// Shows a model as a merge leaves it: experts of a group are the merged one, experts whose router rows go cannot be routed to.
/// Evaluates as the checkpoint that the merge is applied to does, up to the rounding of other matrix kernels.
#[derive(Clone, Debug)]
pub struct MergeOverlay {
    dir: PathBuf,
    checkpoint: Arc<Checkpoint>,
    layers: BTreeMap<usize, Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    record: LayerRecord,
    /// Position of the group of every expert that can be routed to.
    groups: Vec<Option<u32>>,
    removed: Vec<u32>,
    router: Option<Vec<f32>>,
}

impl MergeOverlay {
    /// The overlay of merged experts, with the router as their recipe has it.
    ///
    /// # Errors
    /// [`Error::Output`] for a merged router in a family with biases on it, which an overlay cannot change; files that cannot
    /// be read.
    pub fn new(merged: &MergedWeights, checkpoint: &Arc<Checkpoint>) -> Result<Self> {
        let mut overlay = Self::empty(merged.dir(), checkpoint);
        for layer in &merged.plan().layers {
            overlay.add(merged.record(layer.layer)?, merged.plan().recipe.router)?;
        }
        Ok(overlay)
    }

    pub(super) fn empty(dir: &Path, checkpoint: &Arc<Checkpoint>) -> Self {
        Self { dir: dir.to_path_buf(), checkpoint: checkpoint.clone(), layers: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, record: LayerRecord, rule: RouterConfig) -> Result<()> {
        let layer = record.plan.layer;
        let (config, role) = (self.checkpoint.config(), Role::Layer(layer, LayerRole::Router));
        let experts = config.moe(layer).map_or(0, |moe| moe.num_experts());
        let map = record.plan.index_map(experts);
        let mix = if record.plan.is_identity() { None } else { rule.mix(&record.plan) };
        let Some(mut mix) = mix else {
            self.layers.insert(layer, Layer { record, groups: map, removed: vec![], router: None });
            return Ok(());
        };
        mix.add(&record.additions());
        let removed = record.plan.removed(experts);
        let mut groups = vec![None; experts];
        for (position, group) in record.plan.groups.iter().enumerate() {
            groups[group.dominant as usize] = Some(position as u32);
        }
        let mixed = mix.rows.iter().any(|row| !matches!(row[..], [(_, 1.0)]));
        let router = if mixed {
            if config.routing.bias || config.routing.correction_bias() {
                let reason = "router rows are mixed, and the biases of this family would have to be, which an overlay \
                              cannot do: write the checkpoint";
                return Err(Error::Output { form: "an overlay", reason: reason.into() });
            }
            let hidden = config.hidden_size;
            let mut rows = self.checkpoint.read_f32(role)?;
            let dtype = self.checkpoint.plain_dtype(&self.checkpoint.role(role)?.name)?;
            let old = rows.clone();
            for (group, parts) in record.plan.groups.iter().zip(&mix.rows) {
                let mut sum = vec![0.0f64; hidden];
                for (expert, factor) in parts {
                    let row = &old[expert * hidden..(expert + 1) * hidden];
                    sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += factor * f64::from(*v));
                }
                let at = group.dominant as usize * hidden;
                rows[at..at + hidden].copy_from_slice(&stored(sum.into_iter().map(|v| v as f32).collect(), dtype));
            }
            Some(rows)
        } else {
            None
        };
        self.layers.insert(layer, Layer { record, groups, removed, router });
        Ok(())
    }

    /// The model seen through this overlay; overlays that `model` has are not kept.
    ///
    /// # Errors
    /// Those of [`Model::with_overlays`].
    pub fn of(self, model: &Model) -> Result<Model> {
        let overlay = Arc::new(self);
        Ok(model.with_overlays(Some(overlay.clone()), Some(overlay))?)
    }

    /// The change of a layer-by-layer sweep.
    pub(super) fn change(self) -> LayerChange {
        let overlay = Arc::new(self);
        LayerChange { experts: Some(overlay.clone()), routing: Some(overlay) }
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

impl ExpertOverlay for MergeOverlay {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        let Some(found) = self.layers.get(&layer) else { return Ok(weights) };
        let Some(Some(group)) = found.groups.get(expert) else { return Ok(weights) };
        match read_group(&self.dir, &found.record, *group as usize).map_err(moe_core::Error::observer)? {
            Merged::Unchanged(same) if same == expert => Ok(weights),
            Merged::Unchanged(other) => Ok(self.checkpoint.expert(layer, other)?),
            Merged::Changed(merged) => Ok(*merged),
        }
    }
}

impl RoutingOverlay for MergeOverlay {
    fn removed(&self, layer: usize) -> Option<&[u32]> {
        self.layers.get(&layer).map(|layer| layer.removed.as_slice()).filter(|removed| !removed.is_empty())
    }

    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.layers.get(&layer)?.router.clone()
    }
}
