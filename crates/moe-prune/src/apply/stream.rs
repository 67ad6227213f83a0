//! Writing the tensors of an export one after the other, one expert at a time.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertBiases, ExpertBlock, ExpertPart, LayerRole, Progress, RawMatrix, ShardedWriter,
    TensorInfo, TensorSpec, Written,
};

use super::select::{Selection, changed, select_block};
use super::{ApplyOptions, Export, Target, TargetExpert, TargetLayer};
use crate::{EditSource, Error, PrunePlan, Result};

/// Parts of an expert that edits may change.
const EDITED: [ExpertPart; 2] = [ExpertPart::Down, ExpertPart::DownBias];

/// A tensor to write.
pub(crate) struct OutTensor {
    pub spec: TensorSpec,
    source: Source,
}

impl OutTensor {
    /// The layer whose experts it holds, by position among the MoE layers.
    pub fn layer(&self) -> Option<usize> {
        match self.source {
            Source::Experts(position, _) => Some(position),
            _ => None,
        }
    }
}

enum Source {
    /// The tensor of the same name, as it is.
    Copy,
    /// A row of the tensor of the same name, or of an edited router, for every expert that is written.
    Rows(Rows),
    /// The tensor of the same name with zeros after its rows (of shape before) or after its columns.
    Pad,
    /// Blocks of experts of one MoE layer, by position among the MoE layers, in file order; experts in new indices.
    Experts(usize, Vec<(usize, ExpertBlock)>),
}

/// Rows of a tensor with one per expert.
#[derive(Clone, Copy)]
struct Rows {
    /// The layer, by position among the MoE layers.
    position: usize,
    /// What of the router it is.
    role: LayerRole,
}

/// The tensors of the output in the order in which they are written: that of the input's names, with the routed experts of
/// a layer where the first of them was.
pub(crate) fn tensors(from: &Checkpoint, target: &Target<'_>, options: &ApplyOptions<'_>) -> Result<Vec<OutTensor>> {
    let mut layer_of: BTreeMap<String, usize> = BTreeMap::new();
    let mut rows_of: BTreeMap<String, Rows> = BTreeMap::new();
    let mut pads: BTreeSet<String> = BTreeSet::new();
    for (position, layer) in target.layers.iter().enumerate() {
        for tensor in layer.tensors_before(from)? {
            layer_of.insert(layer.expert_tensor_name(from, tensor.tensor), position);
        }
        let name = |role| layer.tensor_name(from, role);
        let moved = !layer.same_experts(layer.widths_before(from).len());
        let edits = options.edits.filter(|_| layer.further.is_none());
        let edited = edits.map(|edits| edits.router(layer.layer)).transpose()?.flatten().is_some();
        for (role, changed) in [
            (LayerRole::Router, edited),
            (LayerRole::RouterBias, false),
            (LayerRole::CorrectionBias, layer.correction_factor != 1.0),
        ] {
            if moved || changed {
                rows_of.insert(name(role), Rows { position, role });
            }
        }
        if target.shared_width.is_some() {
            pads.extend([LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown].map(name));
        }
    }
    let (mut tensors, mut done) = (Vec::new(), BTreeSet::new());
    for info in from.tensors() {
        if target.dropped.contains(&info.name) || (from.is_scale(&info.name) && !layer_of.contains_key(&info.name)) {
            continue;
        }
        let mut push = |shape: Vec<usize>, source: Source| -> Result<()> {
            let dtype = from.plain_dtype(&info.name)?;
            tensors.push(OutTensor { spec: TensorSpec { name: info.name.clone(), dtype, shape }, source });
            Ok(())
        };
        if let Some(position) = layer_of.get(&info.name) {
            if done.insert(*position) {
                tensors.extend(expert_tensors(from, &target.layers[*position], *position, options.mode)?);
            }
        } else if let Some(rows) = rows_of.get(&info.name) {
            let layer = &target.layers[rows.position];
            let before = layer.widths_before(from).len();
            push(kept_shape(info, before, layer.experts.len()), Source::Rows(*rows))?;
        } else if let Some(width) = target.shared_width.filter(|_| pads.contains(&info.name)) {
            let hidden = from.shape().hidden_size;
            let shape = if info.name.contains("down") { vec![hidden, width] } else { vec![width, hidden] };
            push(shape, Source::Pad)?;
        } else {
            push(info.shape.clone(), Source::Copy)?;
        }
    }
    Ok(tensors)
}

/// The shape of a tensor with one row per expert (or one row of all, `[1, E]`) after the selection.
fn kept_shape(info: &TensorInfo, before: usize, after: usize) -> Vec<usize> {
    let mut shape = info.shape.clone();
    if let Some(size) = shape.iter_mut().find(|size| **size == before) {
        *size = after;
    }
    shape
}

fn expert_tensors(from: &Checkpoint, layer: &TargetLayer<'_>, position: usize, mode: Export) -> Result<Vec<OutTensor>> {
    let refuse = |reason: String| Error::Export { mode: mode.name(), reason };
    let TargetLayer { layout, biases, experts, .. } = layer;
    let label = layer.label();
    let widths = layer.widths();
    let tensors = layout.tensors(from.shape().hidden_size, &widths, *biases).ok_or_else(|| match biases {
        ExpertBiases::Down => refuse(format!(
            "experts of {label} have a bias on their output, which `{}` has no place for: export as ragged",
            from.config().model_type
        )),
        _ => refuse(format!("{label}: {layout:?} experts cannot have widths {widths:?}")),
    })?;
    let mut out = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let name = layer.expert_tensor_name(from, tensor.tensor);
        let mut dtype: Option<Dtype> = None;
        for (expert, block) in &tensor.blocks {
            for part in block.parts() {
                let source = experts[*expert].source;
                let mut found = layer.expert_dtype(from, source, *part)?;
                if found.is_none() && *part == ExpertPart::DownBias {
                    // One that a repair adds is stored like the projection before it.
                    found = layer.expert_dtype(from, source, ExpertPart::Down)?;
                }
                let found =
                    found.ok_or_else(|| refuse(format!("tensor `{name}` would hold biases, but there are none")))?;
                if let Some(other) = dtype.replace(found).filter(|other| *other != found) {
                    return Err(refuse(format!(
                        "tensor `{name}` would hold experts of dtypes {other:?} and {found:?}; they must agree"
                    )));
                }
            }
        }
        let dtype = dtype.ok_or_else(|| refuse(format!("tensor `{name}` would hold no expert")))?;
        let spec = TensorSpec { name, dtype, shape: tensor.shape };
        out.push(OutTensor { spec, source: Source::Experts(position, tensor.blocks) });
    }
    Ok(out)
}

/// One piece of work: a tensor to copy, to take rows of or to pad, or one block of one expert.
#[derive(Clone, Copy)]
enum Job<'a> {
    Copy(&'a TensorSpec),
    Rows(&'a TensorSpec, Rows),
    Pad(&'a TensorSpec),
    Block { spec: &'a TensorSpec, position: usize, expert: usize, block: ExpertBlock },
}

/// Writes all tensors. While one matrix is written, the next is selected: two matrices are in memory.
pub(crate) fn write(
    plan: &PrunePlan,
    from: &Checkpoint,
    tensors: &[OutTensor],
    target: &Target<'_>,
    mut writer: ShardedWriter,
    options: &ApplyOptions<'_>,
) -> Result<Written> {
    let mut jobs: Vec<Job<'_>> = Vec::new();
    let (mut total, mut done) = (0, 0);
    for OutTensor { spec, source } in tensors {
        let bytes = bytes(spec);
        total += bytes;
        if writer.is_finished(&spec.name)? {
            done += bytes;
            continue;
        }
        match source {
            Source::Copy => jobs.push(Job::Copy(spec)),
            Source::Rows(rows) => jobs.push(Job::Rows(spec, *rows)),
            Source::Pad => jobs.push(Job::Pad(spec)),
            Source::Experts(position, blocks) => {
                let block = |(expert, block): &(usize, ExpertBlock)| Job::Block {
                    spec,
                    position: *position,
                    expert: *expert,
                    block: *block,
                };
                jobs.extend(blocks.iter().map(block));
            }
        }
    }

    let (mode, edits) = (options.mode, options.edits);
    let make = |job: Option<&Job<'_>>, out: &mut Vec<u8>| -> Result<()> {
        match job {
            None | Some(Job::Copy(_)) => Ok(()),
            Some(Job::Rows(spec, rows)) => {
                let layer = &target.layers[rows.position];
                let edits = edits.filter(|_| layer.further.is_none());
                take_rows(from, spec, layer, rows.role, (mode, edits), out)
            }
            Some(Job::Pad(spec)) => pad(from, spec, out),
            Some(&Job::Block { spec, position, expert, block }) => {
                let layer = &target.layers[position];
                let expert = &layer.experts[expert];
                let source = expert.source;
                let edit = match edits.filter(|_| layer.further.is_none()) {
                    Some(edits) if block.parts().iter().any(|part| EDITED.contains(part)) => {
                        edits.expert(layer.layer, source)?
                    }
                    _ => None,
                };
                let selection = Selection {
                    units: &expert.units,
                    zero: layer.zero,
                    down_factor: expert.down_factor,
                    bias_factor: expert.bias_factor,
                    // Edits are of decoder layers, which stand first, as in the plan.
                    edit: edit.as_ref().map(|edit| (edit, plan.kept[position].experts[source].as_slice())),
                };
                let selected = select_block(&layer.expert_bytes(from, source)?, block, &selection, out);
                selected.map_err(|reason| {
                    let reason = format!("{}, expert {source}, tensor `{}`: {reason}", layer.label(), spec.name);
                    Error::Export { mode: mode.name(), reason }
                })?;
                layer.release_expert(from, source)
            }
        }
    };
    let (mut current, mut next) = (Vec::new(), Vec::new());
    make(jobs.first(), &mut current)?;
    for (index, job) in jobs.iter().enumerate() {
        let (written, made) = rayon::join(
            || -> Result<(&str, u64)> {
                match job {
                    Job::Copy(spec) => {
                        writer.copy(from, &spec.name)?;
                        Ok((&spec.name, bytes(spec)))
                    }
                    Job::Rows(spec, _) | Job::Pad(spec) | Job::Block { spec, .. } => {
                        writer.append(&spec.name, &current)?;
                        Ok((&spec.name, current.len() as u64))
                    }
                }
            },
            || make(jobs.get(index + 1), &mut next),
        );
        let (tensor, written) = written?;
        made?;
        std::mem::swap(&mut current, &mut next);
        done += written;
        if let Some(progress) = options.progress {
            progress(&Progress { tensor, done, total }).map_err(Error::Interrupted)?;
        }
    }
    Ok(writer.finish()?)
}

/// The bytes of a tensor as it is read.
pub(super) fn whole(from: &Checkpoint, name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.stream_plain(name, 1 << 24, |part| {
        bytes.extend_from_slice(part);
        Ok(())
    })?;
    Ok(bytes)
}

/// The rows of a tensor that belong to the experts that are written.
fn take_rows(
    from: &Checkpoint,
    spec: &TensorSpec,
    layer: &TargetLayer<'_>,
    role: LayerRole,
    (mode, edits): (Export, Option<&dyn EditSource>),
    out: &mut Vec<u8>,
) -> Result<()> {
    let refuse = |reason: String| {
        let reason = format!("{}, tensor `{}`: {reason}", layer.label(), spec.name);
        Error::Export { mode: mode.name(), reason }
    };
    let edited = match (role, edits) {
        (LayerRole::Router, Some(edits)) => edits.router(layer.layer)?,
        _ => None,
    };
    let factor = if role == LayerRole::CorrectionBias { layer.correction_factor } else { 1.0 };
    let bytes = match edited {
        None => whole(from, &spec.name)?,
        Some(values) => {
            let mut bytes = Vec::new();
            changed(spec.dtype, values, 1.0, &mut bytes).map_err(refuse)?;
            bytes
        }
    };
    let row = bytes.len() / layer.widths_before(from).len().max(1);
    out.clear();
    for TargetExpert { source, .. } in &layer.experts {
        out.extend_from_slice(&bytes[source * row..(source + 1) * row]);
    }
    if factor != 1.0 {
        let cols = out.len() * 8 / spec.dtype.bitsize();
        let values = RawMatrix { bytes: out.as_slice().into(), dtype: spec.dtype, rows: 1, cols }.to_f32();
        changed(spec.dtype, values, factor, out).map_err(refuse)?;
    }
    Ok(())
}

/// A matrix with zeros after its rows or columns, up to the shape of `spec`.
fn pad(from: &Checkpoint, spec: &TensorSpec, out: &mut Vec<u8>) -> Result<()> {
    let bytes = whole(from, &spec.name)?;
    let size = spec.dtype.bitsize() / 8;
    let (before, after) = (from.info(&spec.name)?.shape[1] * size, spec.shape[1] * size);
    out.clear();
    for row in bytes.chunks_exact(before.max(1)) {
        out.extend_from_slice(row);
        out.resize(out.len() + after - before, 0);
    }
    out.resize(spec.shape[0] * after, 0);
    Ok(())
}

/// Bytes of a tensor, whose size was checked when the writer laid it out.
pub(crate) fn bytes(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
}
