//! The plain view of quantized weights: what they are without quantization.

use std::borrow::Cow;
use std::ops::Range;

use safetensors::Dtype;

use super::Checkpoint;
#[cfg(doc)]
use crate::ModelSource;
use crate::family::Role;
use crate::formats::matrix::{Matrix, Part, Rows};
use crate::formats::{self, Packed, Quantization};
use crate::source::sliced;
use crate::weights::TensorInfo;
use crate::{Error, Result};

impl Checkpoint {
    /// Whether the weights are quantized. They are read as BF16 then.
    pub fn quantization(&self) -> Option<Quantization> {
        self.config.quantization
    }

    /// Whether a stored tensor only serves a quantized weight of another name (codes, scales, zero points), so that a
    /// checkpoint without quantization does not have it.
    pub fn is_scale(&self, name: &str) -> bool {
        self.companions.contains(name)
    }

    /// All tensors as they are without quantization, sorted by name: quantized weights are BF16, under the names of
    /// their family.
    pub fn plain_tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        let dense = |info: &&TensorInfo| !self.companions.contains(&info.name);
        let mut all: Vec<&TensorInfo> = self.tensors.values().filter(dense).collect();
        all.retain(|info| !self.quantized.contains_key(&info.name));
        all.extend(self.quantized.values().map(|weight| &weight.info));
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all.into_iter()
    }

    /// Dtype and shape of a tensor as it is without quantization.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn plain_info(&self, name: &str) -> Result<&TensorInfo> {
        self.quantized.get(name).map_or_else(|| self.info(name), |weight| Ok(&weight.info))
    }

    /// The tensor of a role as it is without quantization.
    ///
    /// # Errors
    /// As [`Checkpoint::role`].
    pub fn plain_role(&self, role: Role) -> Result<&TensorInfo> {
        let name = self.family.tensor_name(self.untied(role));
        match self.has_role(role) {
            true => self.plain_info(&name),
            false => Err(Error::NoSuchTensor { dir: self.dir.clone(), tensor: name }),
        }
    }

    /// Dtype of a tensor as it is read: BF16 for a quantized one.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn plain_dtype(&self, name: &str) -> Result<Dtype> {
        self.plain_info(name).map(|info| info.dtype)
    }

    /// Like [`Checkpoint::tensor_bytes`], of the tensor with its elements as they are read: BF16 for a quantized one.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor_bytes`].
    pub fn plain_bytes(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        let Some(weight) = self.quantized.get(&info.name) else { return self.tensor_bytes(name, range) };
        self.decoded_bytes(weight, range)
    }

    /// The values of a quantized weight in f32, each the product of its code and its scale, rounded once: what its
    /// [plain bytes](Checkpoint::plain_bytes) are rounded from. `None` for a tensor that is not quantized.
    ///
    /// # Errors
    /// [`Error::NotANumber`]; those of the [source](ModelSource).
    pub fn dequantized_f32(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(weight) = self.quantized.get(name) else { return Ok(None) };
        let all = 0..weight.info.elements() as usize;
        self.decoded(weight, all, 1, |matrix, rows| matrix.f32(rows)).map(Some)
    }

    /// The least number of [plain bytes](Checkpoint::plain_bytes) of a tensor that are worth asking for at once: a row
    /// of a quantized matrix.
    pub fn plain_grain(&self, name: &str) -> usize {
        match self.quantized.get(name) {
            Some(weight) if weight.transposed => 2 * weight.dims.0 * weight.dims.1,
            Some(weight) => 2 * weight.dims.1,
            None => return self.grain(name),
        }
        .max(1)
    }

    /// Like [`Checkpoint::stream`], with the elements of a quantized tensor as BF16.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], and those of `f`.
    pub fn stream_plain(&self, name: &str, max_bytes: usize, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(weight) = self.quantized.get(name) else { return self.stream(name, max_bytes, f) };
        let grain = self.plain_grain(name);
        let (step, end) = ((max_bytes / grain).max(1) * grain, weight.info.bytes as usize);
        for start in (0..end).step_by(step) {
            let range = start..end.min(start + step);
            f(&self.decoded_bytes(weight, range.clone())?)?;
            self.release_plain(name, range);
        }
        Ok(())
    }

    /// The same for a range of [plain bytes](Checkpoint::plain_bytes).
    pub fn release_plain(&self, name: &str, range: Range<usize>) {
        match self.tensors.get(name) {
            Some(info) if !self.quantized.contains_key(name) => self.source.release(info, range),
            _ => self.release_decoded(name, range),
        }
    }

    pub(super) fn release_decoded(&self, name: &str, range: Range<usize>) {
        if let Some(weight) = self.quantized.get(name) {
            let one = (2 * weight.dims.0 * weight.dims.1).max(1);
            self.release_weight(weight, range.start / one..range.end.div_ceil(one));
        }
    }

    /// The quantized weights.
    pub(crate) fn quantized_weights(&self) -> impl Iterator<Item = &Packed> {
        self.quantized.values()
    }

    /// A quantized weight by its name without quantization.
    pub(crate) fn quantized_weight(&self, name: &str) -> Option<&Packed> {
        self.quantized.get(name)
    }

    /// One of the matrices of a quantized weight. Its bytes are views of the files where these hold them.
    pub(super) fn opened(&self, weight: &Packed, matrix: usize) -> Result<Matrix<'_>> {
        weight.open(matrix, |name, number, stack| {
            let info = self.info(name)?;
            let bytes = self.source.bytes(info, formats::share(info.bytes as usize, number, stack))?;
            Ok(Part { dtype: info.dtype, bytes })
        })
    }

    /// Codes and parameters of a matrix of a quantized weight; `None` for a format that is read only.
    pub(crate) fn parted(&self, name: &str, matrix: usize) -> Result<Option<formats::scheme::Parted>> {
        let Some(weight) = self.quantized.get(name) else { return Ok(None) };
        weight.parted(matrix, |name, number, stack| {
            let info = self.info(name)?;
            let bytes = self.source.bytes(info, formats::share(info.bytes as usize, number, stack))?;
            Ok(Part { dtype: info.dtype, bytes })
        })
    }

    /// Gives the pages of matrices of a quantized weight back.
    pub(super) fn release_weight(&self, weight: &Packed, matrices: Range<usize>) {
        for info in weight.parts.iter().filter_map(|name| self.tensors.get(name)) {
            let share = |number| formats::share(info.bytes as usize, weight.first + number, weight.stack);
            self.source.release(info, share(matrices.start).start..share(matrices.end).start);
        }
    }

    /// A range of the bytes of a quantized weight as BF16.
    pub(super) fn decoded_bytes(&self, weight: &Packed, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let elements = range.start / 2..range.end.div_ceil(2);
        let start = 2 * elements.start;
        let bytes = self.decoded(weight, elements, 2, |matrix, rows| matrix.bf16(rows))?;
        Ok(sliced(Cow::Owned(bytes), range.start - start..range.end - start))
    }

    /// A range of the elements of a quantized weight, as it is without quantization, each as `size` of what `decode`
    /// gives.
    fn decoded<T: Copy>(
        &self,
        weight: &Packed,
        elements: Range<usize>,
        size: usize,
        decode: impl Fn(&Matrix<'_>, Rows) -> Option<Vec<T>>,
    ) -> Result<Vec<T>> {
        let (rows, cols) = weight.dims;
        let grain = if weight.transposed { rows * cols } else { cols }.max(1);
        let wanted = elements.start / grain..elements.end.div_ceil(grain);
        let mut out = Vec::with_capacity(wanted.len() * grain * size);
        let failed = || weight.no_number();
        if weight.transposed {
            for number in wanted.clone() {
                let all = decode(&self.opened(weight, number)?, Rows::range(0..rows)).ok_or_else(failed)?;
                for element in 0..rows * cols {
                    let at = element % rows * cols + element / rows;
                    out.extend_from_slice(&all[at * size..(at + 1) * size]);
                }
            }
        } else {
            let mut line = wanted.start;
            while line < wanted.end {
                let (number, first) = (line / rows.max(1), line % rows.max(1));
                let last = rows.min(first + wanted.end - line);
                let matrix = self.opened(weight, number)?;
                out.extend(decode(&matrix, Rows::range(first..last)).ok_or_else(failed)?);
                line += last - first;
            }
        }
        let start = wanted.start * grain;
        out.truncate((elements.end - start) * size);
        out.drain(..(elements.start - start) * size);
        Ok(out)
    }
}
