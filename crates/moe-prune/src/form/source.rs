//! The weights of a pruned model.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Dtype, Error as CheckpointError, ExpertBlock, ExpertPart, LayerRole, ModelSource, RawMatrix, Result,
    Step, TensorInfo, sliced,
};

use super::PruneOptions;
use super::select::{Selection, added_bias, changed, select};
use super::target::{Target, TargetLayer, TargetSet};
use super::tensors::Made;
use crate::{EditSource, Error, ExpertEdit, PrunePlan};

/// What a plan makes of a checkpoint, matrix by matrix, whenever it is asked.
pub(super) struct PrunedSource {
    base: Arc<Checkpoint>,
    target: Target,
    /// Tensors that are neither copies nor made of the decoder's experts.
    made: BTreeMap<String, Made>,
    /// Layers of the target by decoder layer, where anything of the experts is changed.
    changed: BTreeMap<usize, usize>,
    edits: Option<Edited>,
    /// Name of the form, for messages.
    form: &'static str,
    step: Step,
}

/// What a repair changed, and the kept units of every expert of the plan, which columns of its down projections belong
/// to.
struct Edited {
    source: Arc<dyn EditSource>,
    kept: BTreeMap<usize, Vec<Vec<u32>>>,
}

impl PrunedSource {
    pub fn new(
        plan: &PrunePlan,
        base: Arc<Checkpoint>,
        target: Target,
        made: BTreeMap<String, Made>,
        options: &PruneOptions<'_>,
        step: Step,
    ) -> Self {
        let edits = options.edits.clone();
        let unchanged = |layer: &TargetLayer| is_unchanged(&base, layer, edits.as_deref());
        let decoder = target.layers.iter().enumerate().filter(|(_, layer)| layer.further.is_none());
        let changed = decoder.filter(|(_, layer)| !unchanged(layer)).map(|(position, layer)| (layer.layer, position));
        let changed = changed.collect();
        let kept = || plan.kept.iter().map(|kept| (kept.layer, kept.experts.clone())).collect();
        let edits = edits.map(|source| Edited { source, kept: kept() });
        Self { base, target, made, changed, edits, form: options.form.name(), step }
    }

    /// The error of a value that cannot be made.
    fn refused(&self, layer: &TargetLayer, what: String, reason: String) -> CheckpointError {
        let reason = format!("{}, {what}: {reason}", layer.label());
        CheckpointError::method(Error::Export { mode: self.form, reason })
    }

    /// What a repair changed of a part of a set of weights.
    fn edit(&self, layer: &TargetLayer, set: &TargetSet, part: ExpertPart) -> crate::Result<Option<ExpertEdit>> {
        let Some(Edited { source, .. }) = self.edits.as_ref().filter(|_| layer.further.is_none()) else {
            return Ok(None);
        };
        // Values are read where they are needed alone.
        let sizes = source.sizes(layer.layer, set.expert)?;
        let wanted = match part {
            ExpertPart::Down => sizes.down,
            ExpertPart::DownBias => sizes.down_bias,
            _ => None,
        };
        if wanted.is_some() { source.expert(layer.layer, set.expert) } else { Ok(None) }
    }

    /// One part of a set of weights of a layer of the target.
    fn part(&self, layer: &TargetLayer, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let set = &layer.sets[set];
        if !layer.biases.has(part) {
            return Ok(None);
        }
        let edit = self.edit(layer, set, part).map_err(CheckpointError::method)?;
        let kept = self.edits.as_ref().and_then(|edits| edits.kept.get(&layer.layer)).map(|kept| &kept[set.expert]);
        let selection = Selection {
            units: &set.units,
            width: set.width,
            zero: layer.zero,
            down_factor: set.down_factor,
            bias_factor: set.bias_factor,
            edit: edit.as_ref().zip(kept.map(Vec::as_slice)),
        };
        let made = match layer.part(&self.base, set, part)? {
            Some(matrix) => select(part, matrix, &selection),
            None => {
                let dtype = layer.dtype(&self.base, set, part).map_err(CheckpointError::method)?;
                added_bias(self.base.shape().hidden_size, dtype.unwrap_or(Dtype::F32), &selection)
            }
        };
        made.map(Some).map_err(|reason| self.refused(layer, format!("expert {}, {part}", set.expert), reason))
    }

    /// The rows of a tensor that belong to the experts that are left.
    fn rows(&self, tensor: &TensorInfo, layer: &TargetLayer, role: LayerRole) -> Result<Vec<u8>> {
        let refused = |reason| self.refused(layer, format!("tensor `{}`", tensor.name), reason);
        let edits = self.edits.as_ref().filter(|_| role == LayerRole::Router && layer.further.is_none());
        let edited = edits.map(|edits| edits.source.router(layer.layer)).transpose();
        let bytes = match edited.map_err(CheckpointError::method)?.flatten() {
            None => self.base.bytes(&tensor.name)?,
            Some(values) => Cow::Owned(changed(tensor.dtype, values, 1.0).map_err(refused)?),
        };
        // Edits have rows for routed experts.
        let (experts, identities) = (layer.widths_before(&self.base).len(), layer.identities(&self.base));
        let all = self.base.bytes(&tensor.name)?;
        let row = all.len() / (experts + identities).max(1);
        // Identity experts come after the others, and all stay.
        let own = layer.rows.iter().flat_map(|expert| &bytes[expert * row..(expert + 1) * row]);
        let rows: Vec<u8> = own.chain(&all[experts * row..]).copied().collect();
        let factor = if role == LayerRole::CorrectionBias { layer.correction_factor } else { 1.0 };
        if factor == 1.0 {
            return Ok(rows);
        }
        let cols = rows.len() * 8 / tensor.dtype.bitsize();
        let values = RawMatrix { bytes: rows.into(), dtype: tensor.dtype, rows: 1, cols }.to_f32();
        changed(tensor.dtype, values, factor).map_err(refused)
    }

    /// The table of a layer among the experts that are left.
    fn table(&self, tensor: &TensorInfo, layer: &TargetLayer, top_k: usize) -> Result<Vec<u8>> {
        let left: Vec<u32> = layer.rows.iter().map(|expert| *expert as u32).collect();
        match self.base.expert_table(layer.layer)? {
            Some(table) => Ok(table.without(&left, top_k).to_bytes(tensor.dtype)),
            None => Err(self.refused(layer, format!("tensor `{}`", tensor.name), "the layer has no table".into())),
        }
    }

    /// A range of a matrix of this shape with zeros after its rows or columns.
    fn padded(&self, tensor: &TensorInfo, (rows, cols): (usize, usize), range: Range<usize>) -> Result<Vec<u8>> {
        let size = tensor.dtype.bitsize() / 8;
        let (before, after) = (cols * size, (tensor.shape[1] * size).max(1));
        let wanted = range.start / after..range.end.div_ceil(after);
        let mut out = vec![0; wanted.len() * after];
        let there = wanted.start.min(rows)..wanted.end.min(rows);
        let bytes = self.base.tensor_bytes(&tensor.name, there.start * before..there.end * before)?;
        for (row, from) in out.chunks_exact_mut(after).zip(bytes.chunks_exact(before.max(1))) {
            row[..before].copy_from_slice(from);
        }
        let start = wanted.start * after;
        Ok(sliced(Cow::Owned(out), range.start - start..range.end - start).into_owned())
    }

    /// A range of a tensor that has these blocks along the first dimension of the one of the same name.
    fn picked(&self, tensor: &TensorInfo, kept: &[usize], range: Range<usize>) -> Result<Vec<u8>> {
        let size = (tensor.bytes as usize / kept.len().max(1)).max(1);
        let wanted = range.start / size..range.end.div_ceil(size).min(kept.len());
        let mut out = Vec::with_capacity(wanted.len() * size);
        for block in &kept[wanted.clone()] {
            out.extend_from_slice(&self.base.tensor_bytes(&tensor.name, block * size..(block + 1) * size)?);
        }
        let start = wanted.start * size;
        Ok(sliced(Cow::Owned(out), range.start - start..range.end - start).into_owned())
    }

    /// A range of a tensor of blocks of one size, of experts that are none of the decoder's.
    fn blocks(
        &self,
        tensor: &TensorInfo,
        (layer, blocks): (&TargetLayer, &[(usize, ExpertBlock)]),
        range: Range<usize>,
    ) -> Result<Vec<u8>> {
        let size = (tensor.bytes as usize / blocks.len().max(1)).max(1);
        let wanted = range.start / size..range.end.div_ceil(size).min(blocks.len());
        let mut out = Vec::with_capacity(wanted.len() * size);
        for (set, block) in &blocks[wanted.clone()] {
            let parts = block.parts().iter().map(|part| self.part(layer, *set, *part));
            let parts = parts.collect::<Result<Option<Vec<_>>>>()?;
            let missing = || self.refused(layer, format!("tensor `{}`", tensor.name), "a part is missing".into());
            out.extend_from_slice(&parts.and_then(|parts| block.assemble(parts)).ok_or_else(missing)?);
        }
        let start = wanted.start * size;
        Ok(sliced(Cow::Owned(out), range.start - start..range.end - start).into_owned())
    }
}

/// Whether the experts of a layer are those of the checkpoint, byte for byte, in the tensors of its files.
fn is_unchanged(base: &Checkpoint, layer: &TargetLayer, edits: Option<&dyn EditSource>) -> bool {
    let Some(moe) = base.config().moe(layer.layer) else { return true };
    let widths = moe.stored_widths();
    let same = |(index, set): (usize, &TargetSet)| {
        let whole = set.units.len() == set.width && set.width == widths[index];
        let edited = edits.is_some_and(|edits| edits.sizes(layer.layer, set.expert).ok() != Some(Default::default()));
        set.source == index && whole && (set.down_factor, set.bias_factor) == (1.0, 1.0) && !edited
    };
    !base.makes_experts(layer.layer)
        && base.expert_layout(layer.layer).is_ok_and(|layout| layout == layer.layout)
        && moe.biases == layer.biases
        && layer.sets.len() == widths.len()
        && layer.sets.iter().enumerate().all(same)
}

impl ModelSource for PrunedSource {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let layer = |position: usize| &self.target.layers[position];
        Ok(match self.made.get(&tensor.name) {
            None => return self.base.tensor_bytes(&tensor.name, range),
            Some(Made::Rows(position, role)) => sliced(Cow::Owned(self.rows(tensor, layer(*position), *role)?), range),
            Some(Made::Table(position, top_k)) => {
                sliced(Cow::Owned(self.table(tensor, layer(*position), *top_k)?), range)
            }
            Some(Made::Pad { rows, cols }) => Cow::Owned(self.padded(tensor, (*rows, *cols), range)?),
            Some(Made::Blocks(kept)) => Cow::Owned(self.picked(tensor, kept, range)?),
            Some(Made::Experts(position, blocks)) => {
                Cow::Owned(self.blocks(tensor, (layer(*position), blocks), range)?)
            }
        })
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.made.get(&tensor.name) {
            None => self.base.grain(&tensor.name),
            Some(Made::Rows(..) | Made::Table(..)) => tensor.bytes as usize,
            Some(Made::Pad { .. }) => tensor.shape[1] * tensor.dtype.bitsize() / 8,
            Some(Made::Blocks(kept)) => tensor.bytes as usize / kept.len().max(1),
            Some(Made::Experts(_, blocks)) => tensor.bytes as usize / blocks.len().max(1),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.changed.contains_key(&layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        match self.changed.get(&layer) {
            Some(position) => self.part(&self.target.layers[*position], set, part),
            None => self.base.set_part(layer, set, part),
        }
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        match self.made.get(&tensor.name) {
            None => self.base.release_range(&tensor.name, range),
            Some(Made::Experts(position, blocks)) => {
                let layer = &self.target.layers[*position];
                let size = (tensor.bytes as usize / blocks.len().max(1)).max(1);
                let done = range.start / size..range.end.div_ceil(size).min(blocks.len());
                blocks[done].iter().for_each(|(set, _)| layer.release(&self.base, &layer.sets[*set]));
            }
            // A tensor that the base lacks has no pages.
            Some(Made::Rows(..) | Made::Table(..) | Made::Pad { .. } | Made::Blocks(_)) => {
                drop(self.base.release_tensor(&tensor.name))
            }
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        if let Some(layer) = self.changed.get(&layer).map(|position| &self.target.layers[*position]) {
            layer.release(&self.base, &layer.sets[set]);
        }
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }

    fn fingerprint(&self, _: &Checkpoint) -> String {
        self.step.digest.clone()
    }
}
