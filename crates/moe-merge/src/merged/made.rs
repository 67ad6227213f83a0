//! The merged experts of one layer, each kept where it can be read part by part.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Checkpoint, Dtype, ExpertPart, ExpertWeights, RawMatrix, SafetensorsFile, encode};

use super::weights::part_name;
use crate::combination::{GroupSink, Merged};
use crate::router::RouterAddition;
use crate::{Error, Result};

/// What became of every group of a layer, in the dtypes of the checkpoint.
pub(crate) struct MadeLayer {
    /// Changed experts that were computed here, one after the other.
    file: Option<(File, PathBuf)>,
    groups: Vec<Made>,
    /// What is added to router rows.
    pub additions: Vec<RouterAddition>,
}

/// What became of a group.
pub(crate) enum Made {
    /// An expert of the checkpoint as it was.
    Unchanged(usize),
    /// Parts in the layer's file.
    Here(Vec<Slice>),
    /// A safetensors file of its own.
    File(PathBuf),
}

/// One part of an expert in a file.
#[derive(Clone, Copy)]
pub(crate) struct Slice {
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

impl MadeLayer {
    /// Takes the experts of a layer as `combine` gives them; changed ones wait in an anonymous file in `dir`. Group `g`
    /// is stored in the dtypes of expert `like[g]`, with `widths[g]` units.
    pub fn fill(
        from: &Checkpoint,
        layer: usize,
        (like, widths): (&[usize], &[usize]),
        dir: &Path,
        combine: impl FnOnce(GroupSink<'_>) -> Result<Vec<RouterAddition>>,
    ) -> Result<Self> {
        let path = dir.to_path_buf();
        let mut file: Option<File> = None;
        let mut groups: Vec<Option<Made>> = like.iter().map(|_| None).collect();
        let mut end = 0;
        let additions = combine(&mut |group, merged| {
            let Some(slot) = groups.get_mut(group) else {
                let reason = format!("layer {layer}: merged experts for group {group} of {}", like.len());
                return Err(Error::invalid_plan(reason));
            };
            *slot = Some(match merged {
                Merged::Unchanged(expert) => Made::Unchanged(expert),
                Merged::Changed(weights) => {
                    if weights.width != widths[group] {
                        let (found, expected) = (weights.width, widths[group]);
                        let reason = format!("merged into {found} units, expected {expected}");
                        return Err(Error::Incompatible { layer, experts: vec![like[group]], reason });
                    }
                    let (bytes, slices) = encoded(from, (layer, like[group]), &weights, end)?;
                    if file.is_none() {
                        file = Some(tempfile::tempfile_in(dir).map_err(Error::io(&path))?);
                    }
                    if let Some(file) = &mut file {
                        file.write_all(&bytes).map_err(Error::io(&path))?;
                    }
                    end += bytes.len() as u64;
                    Made::Here(slices)
                }
            });
            Ok(())
        })?;
        let file = file.map(|file| (file, path));
        Self::of(layer, groups, file, additions)
    }

    /// A layer of which everything is known.
    pub fn of(
        layer: usize,
        groups: Vec<Option<Made>>,
        file: Option<(File, PathBuf)>,
        additions: Vec<RouterAddition>,
    ) -> Result<Self> {
        if let Some(group) = groups.iter().position(Option::is_none) {
            return Err(Error::invalid_plan(format!("layer {layer}: no merged expert for group {group}")));
        }
        Ok(Self { file, groups: groups.into_iter().flatten().collect(), additions })
    }

    /// The expert of the checkpoint that a group is, if it is one as it was.
    pub fn same_as(&self, group: usize) -> Option<usize> {
        match self.groups.get(group) {
            Some(Made::Unchanged(expert)) => Some(*expert),
            _ => None,
        }
    }

    /// A part of a changed expert; `None` for one that it lacks, and of an expert that is unchanged.
    pub fn part(&self, group: usize, part: ExpertPart) -> Result<Option<RawMatrix<'static>>> {
        match (self.groups.get(group), &self.file) {
            (Some(Made::Here(slices)), Some((file, path))) => {
                let Some(slice) = slices.iter().find(|slice| slice.part == part) else { return Ok(None) };
                let mut bytes = vec![0; slice.bytes()];
                read_at(file, &mut bytes, slice.start).map_err(Error::io(path))?;
                let Slice { dtype, rows, cols, .. } = *slice;
                Ok(Some(RawMatrix { bytes: bytes.into(), dtype, rows, cols }))
            }
            (Some(Made::File(path)), _) => {
                let file = SafetensorsFile::open(path)?;
                let name = part_name(part);
                let Ok(spec) = file.tensor(name) else { return Ok(None) };
                let [rows, cols] = spec.shape[..] else {
                    let reason = format!("`{name}` has shape {:?}, expected two dimensions", spec.shape);
                    return Err(Error::invalid_plan(reason).in_file(path));
                };
                let matrix = RawMatrix { bytes: file.bytes(name)?.to_vec().into(), dtype: spec.dtype, rows, cols };
                file.release();
                Ok(Some(matrix))
            }
            _ => Ok(None),
        }
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], start: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut start: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, start)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                start += read as u64;
            }
        }
    }
    Ok(())
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
        let (rows, cols) = part.dims(weights.hidden, weights.width);
        let values = weights.part(part).filter(|values| values.len() == rows * cols);
        let values = values.ok_or_else(|| {
            let reason = format!("a merged expert has no {part} of its shape");
            Error::Incompatible { layer, experts: vec![like], reason }
        })?;
        let bytes = encoded_part((layer, like), part, dtype, values)?;
        slices.push(Slice { part, dtype, rows, cols, start: start + all.len() as u64 });
        all.extend(bytes);
    }
    Ok((all, slices))
}

/// Values of a part of an expert in a dtype, which must hold them.
pub(crate) fn encoded_part(
    (layer, expert): (usize, usize),
    part: ExpertPart,
    dtype: Dtype,
    values: &[f32],
) -> Result<Vec<u8>> {
    let incompatible = |reason: String| Error::Incompatible { layer, experts: vec![expert], reason };
    let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    if !encode(dtype, values, &mut bytes) {
        return Err(incompatible(format!("{part} cannot be stored as {dtype}")));
    }
    let stored = RawMatrix { bytes: bytes.as_slice().into(), dtype, rows: values.len(), cols: 1 };
    if stored.to_f32().iter().any(|value| !value.is_finite()) {
        return Err(incompatible(format!("a merged value of {part} is not finite as {dtype}")));
    }
    Ok(bytes)
}

/// Bytes of an expert of `width` units in the dtypes of another of its layer.
pub(super) fn expert_bytes(from: &Checkpoint, layer: usize, like: usize, width: usize) -> Result<u64> {
    let mut bytes = 0;
    for part in ExpertPart::ALL.into_iter().chain(ExpertPart::BIASES) {
        let (rows, cols) = part.dims(from.shape().hidden_size, width);
        bytes += from.expert_dtype(layer, like, part)?.map_or(0, |dtype| rows * cols * dtype.bitsize() / 8) as u64;
    }
    Ok(bytes)
}
