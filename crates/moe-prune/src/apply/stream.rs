//! Writing the tensors of an export one after the other, one expert at a time.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Checkpoint, Dtype, ExpertPart, ShardedWriter, TensorSpec, Written};

use super::select::{Selection, select};
use super::{Export, OnProgress, Progress, Target, TargetLayer};
use crate::{Error, PrunePlan, Result};

/// A tensor to write.
pub(crate) struct OutTensor {
    pub spec: TensorSpec,
    source: Source,
}

enum Source {
    /// The tensor of the same name, as it is.
    Copy,
    /// Matrices of experts of one MoE layer, by position among the MoE layers, in file order.
    Experts(usize, Vec<(usize, ExpertPart)>),
}

/// The tensors of the output in the order in which they are written: that of the input's names, with the routed experts of
/// a layer where the first of them was.
pub(crate) fn tensors(from: &Checkpoint, target: &Target, mode: Export) -> Result<Vec<OutTensor>> {
    let mut layer_of: BTreeMap<String, usize> = BTreeMap::new();
    for (position, (old, new)) in from.shape().layers.iter().zip(&target.layers).enumerate() {
        let layout = from.expert_layout(new.layer)?;
        for tensor in layout.tensors(from.shape().hidden_size, &old.widths).into_iter().flatten() {
            layer_of.insert(from.expert_tensor_name(new.layer, tensor.tensor), position);
        }
    }
    let (mut tensors, mut done) = (Vec::new(), BTreeSet::new());
    for info in from.tensors() {
        match layer_of.get(&info.name) {
            None => {
                let spec = TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() };
                tensors.push(OutTensor { spec, source: Source::Copy });
            }
            Some(position) => {
                if done.insert(*position) {
                    tensors.extend(expert_tensors(from, &target.layers[*position], *position, mode)?);
                }
            }
        }
    }
    Ok(tensors)
}

fn expert_tensors(from: &Checkpoint, layer: &TargetLayer, position: usize, mode: Export) -> Result<Vec<OutTensor>> {
    let refuse = |reason: String| Error::Export { mode: mode.name(), reason };
    let TargetLayer { layer: number, layout, widths, .. } = layer;
    let tensors = layout
        .tensors(from.shape().hidden_size, widths)
        .ok_or_else(|| refuse(format!("layer {number}: {layout:?} experts cannot have widths {widths:?}")))?;
    let mut out = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let name = from.expert_tensor_name(*number, tensor.tensor);
        let mut dtype: Option<Dtype> = None;
        for (expert, part) in &tensor.blocks {
            let matrices = from.expert_bytes(*number, *expert)?;
            let found = match part {
                ExpertPart::Gate => matrices.gate,
                ExpertPart::Up => matrices.up,
                ExpertPart::Down => matrices.down,
            }
            .dtype;
            if let Some(other) = dtype.replace(found).filter(|other| *other != found) {
                return Err(refuse(format!(
                    "tensor `{name}` would hold experts of dtypes {other:?} and {found:?}; they must agree"
                )));
            }
        }
        let dtype = dtype.ok_or_else(|| refuse(format!("tensor `{name}` would hold no expert")))?;
        let spec = TensorSpec { name, dtype, shape: tensor.shape };
        out.push(OutTensor { spec, source: Source::Experts(position, tensor.blocks) });
    }
    Ok(out)
}

/// One piece of work: a tensor to copy, or one matrix of one expert.
#[derive(Clone, Copy)]
enum Job<'a> {
    Copy(&'a TensorSpec),
    Matrix { spec: &'a TensorSpec, position: usize, expert: usize, part: ExpertPart },
}

/// Writes all tensors. While one matrix is written, the next is selected: two matrices are in memory.
pub(crate) fn write(
    plan: &PrunePlan,
    from: &Checkpoint,
    tensors: &[OutTensor],
    target: &Target,
    mut writer: ShardedWriter,
    progress: Option<OnProgress<'_>>,
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
            Source::Experts(position, blocks) => {
                let matrix = |(expert, part): &(usize, ExpertPart)| Job::Matrix {
                    spec,
                    position: *position,
                    expert: *expert,
                    part: *part,
                };
                jobs.extend(blocks.iter().map(matrix));
            }
        }
    }

    let make = |job: Option<&Job<'_>>, out: &mut Vec<u8>| -> Result<()> {
        let Some(&Job::Matrix { position, expert, part, .. }) = job else { return Ok(()) };
        let layer = &target.layers[position];
        let kept = &plan.kept[position].experts[expert];
        let selection = if layer.zero { Selection::Zero(kept) } else { Selection::Keep(kept) };
        select(&from.expert_bytes(layer.layer, expert)?, part, selection, out);
        Ok(from.release_expert(layer.layer, expert)?)
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
                    Job::Matrix { spec, .. } => {
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
        if let Some(progress) = progress {
            progress(&Progress { tensor, done, total }).map_err(Error::Interrupted)?;
        }
    }
    Ok(writer.finish()?)
}

/// Bytes of a tensor, whose size was checked when the writer laid it out.
fn bytes(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
}
