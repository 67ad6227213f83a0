//! The merged experts of one layer, waiting in a file to be written.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use moe_checkpoint::{Checkpoint, Dtype, ExpertBytes, ExpertPart, ExpertWeights, RawMatrix, encode};

use super::computed::MergedExperts;
use crate::combination::Merged;
use crate::router::RouterAddition;
use crate::{Error, Result};

/// What became of every group of a layer. Changed experts are in an anonymous file, in the checkpoint's dtypes.
pub(crate) struct LayerStore {
    file: File,
    path: PathBuf,
    groups: Vec<Stored>,
    /// What is added to router rows.
    pub additions: Vec<RouterAddition>,
}

enum Stored {
    Unchanged(usize),
    Changed(Vec<Slice>),
}

/// One part of an expert in the file.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    pub part: ExpertPart,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    pub start: u64,
}

impl Slice {
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.bitsize() / 8
    }
}

impl LayerStore {
    /// Merges the experts of a layer. Group `g` is stored in the dtypes of expert `like[g]`.
    pub fn fill(
        from: &Checkpoint,
        layer: usize,
        like: &[usize],
        merged: &dyn MergedExperts,
        dir: &Path,
    ) -> Result<Self> {
        let path = dir.to_path_buf();
        let mut file = tempfile::tempfile_in(dir).map_err(Error::io(&path))?;
        let mut groups: Vec<Option<Stored>> = like.iter().map(|_| None).collect();
        let mut end = 0;
        let additions = merged.layer(layer, &mut |group, merged| {
            let Some(slot) = groups.get_mut(group) else {
                let reason = format!("layer {layer}: merged experts for group {group} of {}", like.len());
                return Err(Error::invalid_plan(reason));
            };
            *slot = Some(match merged {
                Merged::Unchanged(expert) => Stored::Unchanged(expert),
                Merged::Changed(weights) => {
                    let (bytes, slices) = encoded(from, (layer, like[group]), &weights, end)?;
                    let written = file.seek(SeekFrom::Start(end)).and_then(|_| file.write_all(&bytes));
                    written.map_err(Error::io(&path))?;
                    end += bytes.len() as u64;
                    Stored::Changed(slices)
                }
            });
            Ok(())
        })?;
        let missing = groups.iter().position(Option::is_none);
        if let Some(group) = missing {
            return Err(Error::invalid_plan(format!("layer {layer}: no merged expert for group {group}")));
        }
        Ok(Self { file, path, groups: groups.into_iter().flatten().collect(), additions })
    }

    /// The expert of the checkpoint that a group is, if it is one as it was.
    pub fn same_as(&self, group: usize) -> Option<usize> {
        match self.groups.get(group) {
            Some(Stored::Unchanged(expert)) => Some(*expert),
            _ => None,
        }
    }

    /// A changed expert.
    pub fn read(&mut self, group: usize) -> Result<ExpertBytes<'static>> {
        let slices = match &self.groups[group] {
            Stored::Changed(slices) => slices.clone(),
            Stored::Unchanged(_) => Vec::new(),
        };
        let mut parts = Vec::with_capacity(slices.len());
        for slice in slices {
            let mut bytes = vec![0; slice.bytes()];
            let mut read = || {
                self.file.seek(SeekFrom::Start(slice.start))?;
                self.file.read_exact(&mut bytes)
            };
            read().map_err(Error::io(&self.path))?;
            let matrix = RawMatrix { bytes: bytes.into(), dtype: slice.dtype, rows: slice.rows, cols: slice.cols };
            parts.push((slice.part, matrix));
        }
        let mut take = |part: ExpertPart| {
            let at = parts.iter().position(|(found, _)| *found == part);
            at.map(|at| parts.swap_remove(at).1)
        };
        let [gate, up, down] = ExpertPart::ALL.map(&mut take);
        let biases = [take(ExpertPart::GateBias), take(ExpertPart::UpBias), take(ExpertPart::DownBias)];
        let [gate_bias, up_bias, down_bias] = biases;
        match (gate, up, down) {
            (Some(gate), Some(up), Some(down)) => {
                Ok(ExpertBytes { gate, up, down, gate_up_bias: gate_bias.zip(up_bias).map(<[_; 2]>::from), down_bias })
            }
            _ => Err(Error::invalid_plan(format!("group {group} has no merged weights"))),
        }
    }
}

/// The parts of an expert in the dtypes of expert `like`, one after the other, to be written from `start`.
pub(super) fn encoded(
    from: &Checkpoint,
    (layer, like): (usize, usize),
    weights: &ExpertWeights,
    start: u64,
) -> Result<(Vec<u8>, Vec<Slice>)> {
    let (mut slices, mut all) = (Vec::with_capacity(6), Vec::new());
    for part in ExpertPart::ALL.into_iter().chain(ExpertPart::BIASES) {
        let Some(dtype) = from.expert_dtype(layer, like, part)? else { continue };
        let values = weights.part(part);
        let (rows, cols) = part.dims(weights.hidden, weights.width);
        let incompatible = |reason: String| Error::Incompatible { layer, experts: vec![like], reason };
        let values = values.filter(|values| values.len() == rows * cols);
        let values = values.ok_or_else(|| incompatible(format!("a merged expert has no {part:?} of its shape")))?;
        let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
        if !encode(dtype, values, &mut bytes) {
            return Err(incompatible(format!("{part:?} cannot be stored as {dtype:?}")));
        }
        let stored = RawMatrix { bytes: bytes.as_slice().into(), dtype, rows, cols };
        if stored.to_f32().iter().any(|value| !value.is_finite()) {
            return Err(incompatible(format!("a merged value of {part:?} is not finite as {dtype:?}")));
        }
        slices.push(Slice { part, dtype, rows, cols, start: start + all.len() as u64 });
        all.extend(bytes);
    }
    Ok((all, slices))
}
