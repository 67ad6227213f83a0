//! Tensors by name and by role: what they are, their bytes, their values.

use std::borrow::Cow;
use std::ops::Range;

use safetensors::Dtype;

use super::Checkpoint;
#[cfg(doc)]
use crate::ModelSource;
use crate::convert;
use crate::family::Role;
use crate::source::sliced;
use crate::verify;
use crate::weights::TensorInfo;
use crate::{Error, Result};

impl Checkpoint {
    /// All tensors as they are stored, sorted by name: of a quantized weight those of its codes, scales and so on.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Dtype, shape and place of a tensor that is stored, else of a quantized weight that is stored under other names.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let quantized = || self.quantized.get(name).map(|weight| &weight.info);
        let missing = || Error::NoSuchTensor { dir: self.dir.clone(), tensor: name.to_string() };
        self.tensors.get(name).or_else(quantized).ok_or_else(missing)
    }

    /// The tensor of a role as it is stored, the embedding for the head of a model with tied embeddings.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a role that the model does not have.
    pub fn role(&self, role: Role) -> Result<&TensorInfo> {
        let name = self.family.tensor_name(self.untied(role));
        match self.has_role(role) {
            true => self.info(&name),
            false => Err(Error::NoSuchTensor { dir: self.dir.clone(), tensor: name }),
        }
    }

    /// Whether the config of the model has a place for a role. Names do not tell: a family may call the tensors of two
    /// roles alike of which a layer has one, and files may hold keys and values of layers that read those of others.
    pub(super) fn has_role(&self, role: Role) -> bool {
        match role {
            Role::Layer(layer, of) => layer >= self.config.layers.len() || self.roles.contains(&(layer, of)),
            _ => true,
        }
    }

    pub(super) fn untied(&self, role: Role) -> Role {
        if role == Role::LmHead && self.config.tie_word_embeddings { Role::Embedding } else { role }
    }

    /// Sum of the bytes of all tensors.
    pub fn bytes_on_disk(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// Tensors of multi-token prediction: those of the layers after the decoder layers and those under `mtp.`. They are
    /// carried along, not interpreted.
    pub fn mtp_tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().filter(|info| self.is_mtp(&info.name))
    }

    /// Whether a tensor is one of [`Checkpoint::mtp_tensors`].
    pub fn is_mtp(&self, name: &str) -> bool {
        name.starts_with("mtp.")
            || name.starts_with("model.mtp_")
            || self.family.layer_of(name).is_some_and(|layer| layer >= self.config.layers.len())
    }

    /// Elements of all tensors; a head that is tied to the embedding counts once, even if the file has both. Factors of
    /// quantized tensors do not count.
    pub fn parameters(&self) -> u64 {
        let tied_head = self.config.tie_word_embeddings.then(|| self.family.tensor_name(Role::LmHead));
        let counted = self.plain_tensors().filter(|tensor| Some(&tensor.name) != tied_head.as_ref());
        counted.map(TensorInfo::elements).sum()
    }

    /// The bytes of a tensor: mapped, without a copy, where a file holds them, and made otherwise. They stay resident
    /// until [`Checkpoint::release`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; those of the [source](ModelSource).
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        self.range(info, 0..info.bytes as usize)
    }

    /// A range of the bytes of a tensor, like [`Checkpoint::bytes`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`]; those of the [source](ModelSource).
    pub fn tensor_bytes(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        if range.start > range.end || range.end as u64 > info.bytes {
            return Err(Error::OutOfRange {
                what: format!("bytes of tensor `{name}`"),
                found: format!("{range:?}"),
                expected: format!("a range within 0..{}", info.bytes),
            });
        }
        self.range(info, range)
    }

    /// The least number of bytes of a tensor that are worth asking for at once; see [`ModelSource::grain`].
    pub fn grain(&self, name: &str) -> usize {
        match self.tensors.get(name) {
            Some(info) if self.made.contains_key(name) => info.bytes as usize,
            Some(info) => self.source.grain(info).clamp(1, (info.bytes as usize).max(1)),
            None if self.quantized.contains_key(name) => self.plain_grain(name),
            None => 1,
        }
    }

    /// Calls `f` with the bytes of a tensor, in order, by slices of about `max_bytes` (at least 1), and gives their
    /// pages back as it goes: a copy of any size within a small resident memory.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], those of the [source](ModelSource), and those of `f`.
    pub fn stream(&self, name: &str, max_bytes: usize, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let info = self.info(name)?;
        let grain = self.grain(name);
        let step = (max_bytes.max(1) / grain).max(1) * grain;
        let end = info.bytes as usize;
        for start in (0..end).step_by(step) {
            let slice = start..end.min(start.saturating_add(step));
            f(&self.range(info, slice.clone())?)?;
            self.release_range(name, slice);
        }
        Ok(())
    }

    /// Any bytes of a tensor.
    pub(super) fn range(&self, info: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let Some(made) = self.made.get(&info.name) else {
            return match self.quantized.get(&info.name) {
                Some(weight) if !self.tensors.contains_key(&info.name) => self.decoded_bytes(weight, range),
                _ => self.source.bytes(info, range),
            };
        };
        let mut out = Vec::with_capacity(range.len());
        for (index, (set, block, begin)) in made.blocks.iter().enumerate() {
            let end = made.blocks.get(index + 1).map_or(info.bytes as usize, |next| next.2);
            let wanted = range.start.max(*begin)..range.end.min(end);
            if wanted.is_empty() {
                continue;
            }
            let bytes = self.block(made.layer, *set, *block)?;
            let part = wanted.start - begin..wanted.end - begin;
            if wanted == range {
                return Ok(sliced(bytes, part));
            }
            out.extend_from_slice(&bytes[part]);
        }
        Ok(Cow::Owned(out))
    }

    /// Gives all mapped pages back to the system. Views stay valid: what is read again is paged in again.
    pub fn release(&self) {
        self.source.release_all();
    }

    /// Has what files hold of a decoder layer read into the memory of the system, where it costs the process nothing
    /// and is found when it is read. Waits for the disk as long as that takes: for a thread that has nothing else to
    /// do. Nothing but speed depends on it.
    pub fn read_ahead(&self, layer: usize) {
        self.source.read_ahead(self, layer);
    }

    /// Whether a tensor belongs to a decoder layer by its name.
    pub(crate) fn is_of_layer(&self, tensor: &TensorInfo, layer: usize) -> bool {
        self.family.layer_of(&tensor.name) == Some(layer)
    }

    /// Gives the mapped pages of some bytes of a tensor back to the system. A name that the model does not have holds
    /// no pages.
    pub fn release_range(&self, name: &str, range: Range<usize>) {
        match self.tensors.get(name) {
            Some(info) => self.source.release(info, range),
            None => self.release_decoded(name, range),
        }
    }

    /// Gives the mapped pages of one tensor back to the system.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn release_tensor(&self, name: &str) -> Result<()> {
        let info = self.info(name)?;
        if let Some(made) = self.made.get(name) {
            made.blocks.iter().for_each(|(set, ..)| self.source.release_expert(made.layer, *set));
        } else if let Some(weight) = self.quantized.get(name) {
            self.release_weight(weight, 0..weight.count());
        } else {
            self.source.release(info, 0..info.bytes as usize);
        }
        Ok(())
    }

    /// A whole tensor as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a role that the model does not have.
    pub fn read_f32(&self, role: Role) -> Result<Vec<f32>> {
        let info = self.plain_info(&self.role(role)?.name)?;
        self.read_part(info, 0..info.elements() as usize)
    }

    /// Rows of the first dimension of a tensor as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`].
    pub fn read_f32_rows(&self, role: Role, rows: Range<usize>) -> Result<Vec<f32>> {
        let info = self.plain_info(&self.role(role)?.name)?;
        let count = info.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > count {
            return Err(Error::OutOfRange {
                what: format!("row range of tensor `{}`", info.name),
                found: format!("{rows:?}"),
                expected: format!("rows within 0..{count}"),
            });
        }
        let row: usize = info.shape.iter().skip(1).product();
        self.read_part(info, rows.start * row..rows.end * row)
    }

    /// Columns of one row of a matrix as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`].
    pub fn read_f32_columns(&self, role: Role, row: usize, columns: Range<usize>) -> Result<Vec<f32>> {
        let info = self.plain_info(&self.role(role)?.name)?;
        let (rows, width) = (info.shape.first().copied().unwrap_or(1), info.shape.iter().skip(1).product::<usize>());
        if row >= rows || columns.start > columns.end || columns.end > width {
            return Err(Error::OutOfRange {
                what: format!("row and columns of tensor `{}`", info.name),
                found: format!("{row} and {columns:?}"),
                expected: format!("a row below {rows} and columns within 0..{width}"),
            });
        }
        self.read_part(info, row * width + columns.start..row * width + columns.end)
    }

    /// Any tensor of F32, F16 or BF16 by its name, as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::UnsupportedDtype`].
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.plain_info(name)?;
        self.read_part(info, 0..info.elements() as usize)
    }

    fn read_part(&self, info: &TensorInfo, elements: Range<usize>) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        self.read_part_into(info, elements, &mut out)?;
        Ok(out)
    }

    pub(super) fn read_part_into(&self, info: &TensorInfo, elements: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        if let Some(weight) = self.quantized.get(&info.name) {
            let bytes = self.decoded_bytes(weight, 2 * elements.start..2 * elements.end)?;
            out.resize(elements.len(), 0.0);
            convert::decode(Dtype::BF16, &bytes, out, |_| {});
            self.release_plain(&info.name, 2 * elements.start..2 * elements.end);
            return Ok(());
        }
        if convert::float_bytes(info.dtype).is_none() {
            return Err(Error::UnsupportedDtype {
                file: info.file.to_path_buf(),
                tensor: info.name.clone(),
                found: info.dtype,
                expected: verify::FLOATS.to_string(),
            });
        }
        out.resize(elements.len(), 0.0);
        let range = info.byte_range(&elements);
        let bytes = self.range(info, range.clone())?;
        convert::decode(info.dtype, &bytes, out, |done| {
            self.source.release(info, range.start + done.start..range.start + done.end);
        });
        Ok(())
    }
}
