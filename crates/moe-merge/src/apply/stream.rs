//! Writing the tensors of a merged checkpoint one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertBlock, ExpertBytes, LayerRole, RawMatrix, Role, ShardedWriter, TensorSpec, encode,
};
use moe_checkpoint::{OnProgress, Progress};

use super::computed::MergedExperts;
use super::store::LayerStore;
use super::target::{Target, TargetLayer};
use crate::{Error, Result};

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
    /// Rows of the tensor of the same name, mixed, of the MoE layer at this position.
    Router(usize, LayerRole),
    /// Blocks of experts of the MoE layer at this position, in file order; experts as they are written.
    Experts(usize, Vec<(usize, ExpertBlock)>),
}

/// The tensors of the output in the order in which they are written: that of the input's names, with the routed experts of
/// a layer where the first of them was.
pub(crate) fn tensors(from: &Checkpoint, target: &Target, dropped: &BTreeSet<String>) -> Result<Vec<OutTensor>> {
    let mut layer_of: BTreeMap<String, usize> = BTreeMap::new();
    let mut router_of: BTreeMap<String, (usize, LayerRole)> = BTreeMap::new();
    for (position, (old, new)) in from.shape().layers.iter().zip(&target.layers).enumerate() {
        let layout = from.expert_layout(new.layer)?;
        for tensor in layout.tensors(from.shape().hidden_size, &old.widths, new.biases).into_iter().flatten() {
            layer_of.insert(from.expert_tensor_name(new.layer, tensor.tensor), position);
        }
        if new.mix.is_some() {
            for role in [LayerRole::Router, LayerRole::RouterBias, LayerRole::CorrectionBias] {
                router_of.insert(from.family().tensor_name(Role::Layer(new.layer, role)), (position, role));
            }
        }
    }
    let (mut tensors, mut done) = (Vec::new(), BTreeSet::new());
    for info in from.tensors() {
        if dropped.contains(&info.name) || (from.is_scale(&info.name) && !layer_of.contains_key(&info.name)) {
            continue;
        }
        let spec = |shape: Vec<usize>| -> Result<TensorSpec> {
            Ok(TensorSpec { name: info.name.clone(), dtype: from.plain_dtype(&info.name)?, shape })
        };
        if let Some(position) = layer_of.get(&info.name) {
            if done.insert(*position) {
                tensors.extend(expert_tensors(from, target, *position)?);
            }
        } else if let Some((position, role)) = router_of.get(&info.name) {
            let rows = target.layers[*position].mix.as_ref().map_or(0, |mix| mix.rows.len());
            let before = from.shape().layers[*position].num_experts();
            let mut shape = info.shape.clone();
            // One row per expert, or one row of all (`[1, E]`).
            if let Some(size) = shape.iter_mut().find(|size| **size == before) {
                *size = rows;
            }
            tensors.push(OutTensor { spec: spec(shape)?, source: Source::Router(*position, *role) });
        } else {
            tensors.push(OutTensor { spec: spec(info.shape.clone())?, source: Source::Copy });
        }
    }
    Ok(tensors)
}

fn expert_tensors(from: &Checkpoint, target: &Target, position: usize) -> Result<Vec<OutTensor>> {
    let layer = &target.layers[position];
    let refuse = |reason: String| Error::Output { form: target.form.name(), reason };
    let TargetLayer { layer: number, layout, biases, widths, groups, dominants, .. } = layer;
    let tensors = layout
        .tensors(from.shape().hidden_size, widths, *biases)
        .ok_or_else(|| refuse(format!("layer {number}: {layout:?} experts cannot have widths {widths:?}")))?;
    let mut out = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let name = from.expert_tensor_name(*number, tensor.tensor);
        let mut dtype: Option<Dtype> = None;
        for (written, block) in &tensor.blocks {
            let dominant = dominants[groups[*written]];
            for part in block.parts() {
                let found = from.expert_dtype(*number, dominant, *part)?;
                let found = found.ok_or_else(|| refuse(format!("tensor `{name}` would hold {part:?}, absent")))?;
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

/// Writes all tensors.
pub(crate) fn write(
    from: &Checkpoint,
    tensors: &[OutTensor],
    target: &Target,
    merged: &dyn MergedExperts,
    mut writer: ShardedWriter,
    (dir, on_progress): (&Path, Option<OnProgress<'_>>),
) -> Result<()> {
    let total: u64 = tensors.iter().map(|tensor| bytes(&tensor.spec)).sum();
    let mut done = 0;
    let progress = |tensor: &str, done: u64| match on_progress {
        Some(progress) => progress(&Progress { tensor, done, total }).map_err(Error::Interrupted),
        None => Ok(()),
    };
    let mut store: Option<(usize, LayerStore)> = None;
    for OutTensor { spec, source } in tensors {
        if writer.is_finished(&spec.name)? {
            done += bytes(spec);
            continue;
        }
        match source {
            Source::Copy => {
                writer.copy(from, &spec.name)?;
                done += bytes(spec);
                progress(&spec.name, done)?;
            }
            Source::Router(position, role) => {
                if merged.adds_to_router() {
                    filled(&mut store, *position, from, target, merged, dir)?;
                }
                let additions = store.as_ref().filter(|(at, _)| at == position);
                let mixed = mix_rows(from, spec, &target.layers[*position], *role, additions.map(|(_, store)| store))?;
                writer.append(&spec.name, &mixed)?;
                done += bytes(spec);
                progress(&spec.name, done)?;
            }
            Source::Experts(position, blocks) => {
                let layer = &target.layers[*position];
                let store = filled(&mut store, *position, from, target, merged, dir)?;
                let mut read: Option<(usize, ExpertBytes<'static>)> = None;
                for (written, block) in blocks {
                    let group = layer.groups[*written];
                    let failed = || Error::Output {
                        form: target.form.name(),
                        reason: format!("layer {}, tensor `{}`: gate and up differ in dtype", layer.layer, spec.name),
                    };
                    let length = match store.same_as(group) {
                        Some(expert) => {
                            let expert_bytes = from.expert_bytes(layer.layer, expert)?;
                            let made = block.bytes(&expert_bytes).ok_or_else(failed)?;
                            writer.append(&spec.name, &made)?;
                            let length = made.len();
                            drop(made);
                            drop(expert_bytes);
                            from.release_expert(layer.layer, expert)?;
                            length
                        }
                        None => {
                            if read.as_ref().is_none_or(|(at, _)| *at != group) {
                                read = Some((group, store.read(group)?));
                            }
                            let Some((_, expert)) = &read else { continue };
                            let made = block.bytes(expert).ok_or_else(failed)?;
                            writer.append(&spec.name, &made)?;
                            made.len()
                        }
                    };
                    done += length as u64;
                    progress(&spec.name, done)?;
                }
            }
        }
    }
    writer.finish()?;
    Ok(())
}

/// The merged experts of a layer, computed if they are not there; those of an earlier layer go.
fn filled<'s>(
    store: &'s mut Option<(usize, LayerStore)>,
    position: usize,
    from: &Checkpoint,
    target: &Target,
    merged: &dyn MergedExperts,
    dir: &Path,
) -> Result<&'s mut LayerStore> {
    if store.as_ref().is_none_or(|(at, _)| *at != position) {
        let layer = &target.layers[position];
        *store = None;
        let filled = LayerStore::fill(from, layer.layer, &layer.dominants, merged, dir)?;
        *store = Some((position, filled));
    }
    match store {
        Some((_, store)) => Ok(store),
        None => Err(Error::invalid_plan("a layer without merged experts")),
    }
}

/// The bytes of a tensor as it is read.
fn whole(from: &Checkpoint, name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.stream_plain(name, 1 << 24, |part| {
        bytes.extend_from_slice(part);
        Ok(())
    })?;
    Ok(bytes)
}

/// A router's weight or bias after mixing. Rows that are a single old one are copied byte for byte.
fn mix_rows(
    from: &Checkpoint,
    spec: &TensorSpec,
    layer: &TargetLayer,
    role: LayerRole,
    store: Option<&LayerStore>,
) -> Result<Vec<u8>> {
    let Some(mut mix) = layer.mix.clone() else { return whole(from, &spec.name) };
    if let Some(store) = store {
        mix.add(&store.additions);
    }
    let old = whole(from, &spec.name)?;
    let experts = from.config().moe(layer.layer).map_or(1, |moe| moe.num_experts().max(1));
    let size = spec.dtype.bitsize() / 8;
    let row_bytes = old.len() / experts;
    let row = |expert: usize| &old[expert * row_bytes..(expert + 1) * row_bytes];
    let values = |expert: usize| {
        RawMatrix { bytes: row(expert).into(), dtype: spec.dtype, rows: 1, cols: row_bytes / size }.to_f32()
    };
    let mut out = Vec::with_capacity(mix.rows.len() * row_bytes);
    for (parts, bias) in mix.rows.iter().zip(&mix.bias) {
        let bias = if role == LayerRole::RouterBias { *bias } else { 0.0 };
        if let ([(expert, 1.0)], 0.0) = (&parts[..], bias) {
            out.extend_from_slice(row(*expert));
            continue;
        }
        let mut sum = vec![bias; row_bytes / size];
        for (expert, factor) in parts {
            sum.iter_mut().zip(values(*expert)).for_each(|(sum, v)| *sum += factor * f64::from(v));
        }
        let sum: Vec<f32> = sum.into_iter().map(|v| v as f32).collect();
        let mut encoded = Vec::with_capacity(row_bytes);
        if !encode(spec.dtype, &sum, &mut encoded) || sum.iter().any(|v| !v.is_finite()) {
            let reason = format!("rows of tensor `{}` cannot be mixed as {:?}", spec.name, spec.dtype);
            return Err(Error::Incompatible { layer: layer.layer, experts: vec![], reason });
        }
        out.extend(encoded);
    }
    Ok(out)
}

/// Bytes of a tensor, whose size was checked when the writer laid it out.
pub(crate) fn bytes(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
}
