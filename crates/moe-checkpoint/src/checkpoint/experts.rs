//! Routed experts, in one orientation whatever layout holds them.

use std::borrow::Cow;

use safetensors::Dtype;

use super::Checkpoint;
#[cfg(doc)]
use crate::ModelSource;
use crate::convert;
use crate::expert_bytes::{ExpertBytes, RawMatrix};
use crate::expert_weights::ExpertWeights;
use crate::experts::{ExpertBiases, ExpertBlock, ExpertLayout, ExpertPart, ExpertTensor, Placement};
use crate::weights::TensorInfo;
use crate::{Error, Result};

impl Checkpoint {
    /// How the routed experts of an MoE layer are stored.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`].
    pub fn expert_layout(&self, layer: usize) -> Result<ExpertLayout> {
        self.layouts.get(&layer).copied().ok_or_else(|| self.unknown_layer(layer))
    }

    /// Whether the routed experts of an MoE layer are made part by part, by a [`ModelSource`]; otherwise they lie in
    /// the bytes of tensors.
    pub fn makes_experts(&self, layer: usize) -> bool {
        self.source.makes_experts(layer)
    }

    /// Dtype of a part of a routed expert as it is read, without reading it; `None` for a bias that does not exist.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_dtype(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<Option<Dtype>> {
        let (set, biases) = self.stored_set(layer, expert)?;
        if !biases.has(part) {
            return Ok(None);
        }
        let (info, _) = self.place(layer, set, part)?;
        Ok(Some(self.plain_dtype(&info.name)?))
    }

    /// Bytes of the routed experts of an MoE layer as the files hold them.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`].
    pub fn expert_bytes_on_disk(&self, layer: usize) -> Result<u64> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let tensors =
            self.expert_layout(layer)?.tensors(self.config.expert_hidden_size(), &moe.stored_widths(), moe.biases);
        let mut bytes = 0;
        for tensor in tensors.into_iter().flatten() {
            let info = self.info(&self.family.expert_tensor_name(layer, tensor.tensor))?;
            bytes += self.quantized.get(&info.name).map_or(info.bytes, |weight| weight.bytes);
        }
        Ok(bytes)
    }

    /// The name of a tensor of routed experts in this family.
    pub fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        self.family.expert_tensor_name(layer, tensor)
    }

    /// The weights of a routed expert as f32, from whatever layout.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        let mut weights = ExpertWeights::default();
        self.expert_into(layer, expert, &mut weights)?;
        Ok(weights)
    }

    /// Like [`Checkpoint::expert`], into buffers that are reused.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_into(&self, layer: usize, expert: usize, weights: &mut ExpertWeights) -> Result<()> {
        let (set, biases) = self.stored_set(layer, expert)?;
        if !biases.has(ExpertPart::GateBias) {
            (weights.gate_bias, weights.up_bias) = (None, None);
        }
        if !biases.has(ExpertPart::DownBias) {
            weights.down_bias = None;
        }
        for part in parts(biases) {
            let buffer = weights.buffer(part);
            if !self.source.makes_experts(layer) {
                let (info, place) = self.place(layer, set, part)?;
                if place.is_contiguous() && convert::float_bytes(info.dtype).is_some() {
                    self.read_part_into(info, place.range(), buffer)?;
                    continue;
                }
            }
            let Some(matrix) = self.set_part(layer, set, part)? else { continue };
            buffer.resize(matrix.rows * matrix.cols, 0.0);
            convert::decode(matrix.dtype, &matrix.bytes, buffer, |_| {});
        }
        self.release_set(layer, set);
        weights.hidden = self.config.expert_hidden_size();
        weights.width = weights.gate.len() / weights.hidden;
        Ok(())
    }

    /// The weights of a routed expert in their canonical orientation without a cast, from whatever layout: views of the
    /// file where it holds them so, which stay resident until [`Checkpoint::release_expert`] or
    /// [`Checkpoint::release`], else copies. Quantized weights are BF16.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_bytes(&self, layer: usize, expert: usize) -> Result<ExpertBytes<'_>> {
        let (set, biases) = self.stored_set(layer, expert)?;
        let read = |part: ExpertPart| {
            let missing = || Error::OutOfRange {
                what: format!("layer {layer}, expert {expert}"),
                found: format!("no {part}"),
                expected: "every part that its config has".to_string(),
            };
            self.set_part(layer, set, part)?.ok_or_else(missing)
        };
        let bias = |part: ExpertPart| biases.has(part).then(|| read(part)).transpose();
        let gate_up_bias = bias(ExpertPart::GateBias)?.zip(bias(ExpertPart::UpBias)?).map(<[_; 2]>::from);
        let down_bias = bias(ExpertPart::DownBias)?;
        let [gate, up, down] = ExpertPart::ALL;
        Ok(ExpertBytes { gate: read(gate)?, up: read(up)?, down: read(down)?, gate_up_bias, down_bias })
    }

    /// One part of a routed expert, like [`Checkpoint::expert_bytes`]; `None` for a bias that it does not have.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_part(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let (set, _) = self.stored_set(layer, expert)?;
        self.set_part(layer, set, part)
    }

    /// One part of a set of weights that experts may share, like [`Checkpoint::expert_part`]. Sets are the experts of
    /// the layer, unless the checkpoint is [grouped](Checkpoint::grouped).
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`]; those of the [source](ModelSource).
    pub fn set_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let count = moe.stored_widths().len();
        if set >= count {
            return Err(Error::UnknownExpert { layer, expert: set, count });
        }
        if !moe.biases.has(part) {
            return Ok(None);
        }
        if self.source.makes_experts(layer) {
            return self.source.expert_part(layer, set, part);
        }
        let (info, place) = self.place(layer, set, part)?;
        self.matrix(info, &place).map(Some)
    }

    /// The bytes of one block of an expert that the source makes.
    pub(crate) fn block(&self, layer: usize, set: usize, block: ExpertBlock) -> Result<Cow<'_, [u8]>> {
        if block == ExpertBlock::Part(ExpertPart::Up) && self.expert_layout(layer)? == ExpertLayout::Gateless {
            let [gate, up] = [ExpertPart::Gate, ExpertPart::Up].map(|part| self.set_part(layer, set, part));
            if let (Some(gate), Some(up)) = (gate?, up?)
                && gate.bytes != up.bytes
            {
                return Err(Error::OutOfRange {
                    what: format!("layer {layer}, expert {set}"),
                    found: "a gate that is not the up projection".to_string(),
                    expected: "the same rows, since experts of this model have no gate of their own".to_string(),
                });
            }
        }
        let parts = block.parts().iter().map(|part| {
            let missing = || Error::OutOfRange {
                what: format!("layer {layer}, expert {set}"),
                found: format!("no {part}"),
                expected: "every part that its config has".to_string(),
            };
            self.set_part(layer, set, *part)?.ok_or_else(missing)
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        block.assemble(parts).ok_or_else(|| Error::OutOfRange {
            what: format!("layer {layer}, expert {set}"),
            found: "gate and up of different dtypes or shapes".to_string(),
            expected: "the same ones, since one tensor holds both".to_string(),
        })
    }

    /// Whether the experts of a layer are stored as the transposes of what they are without quantization.
    pub(crate) fn experts_are_transposed(&self, layer: usize) -> bool {
        let place = |part| self.place(layer, 0, part).ok();
        let weight = |part| self.quantized.get(&place(part)?.0.name);
        ExpertPart::ALL.into_iter().filter_map(weight).any(|weight| weight.transposed)
    }

    /// Gives the mapped pages of a routed expert back to the system.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn release_expert(&self, layer: usize, expert: usize) -> Result<()> {
        let (set, _) = self.stored_set(layer, expert)?;
        self.release_set(layer, set);
        Ok(())
    }

    /// Gives the mapped pages of a set of weights that experts may share back to the system.
    pub fn release_set(&self, layer: usize, set: usize) {
        if self.source.makes_experts(layer) {
            return self.source.release_expert(layer, set);
        }
        let biases = self.config.moe(layer).map_or(ExpertBiases::None, |moe| moe.biases);
        for part in parts(biases) {
            if let Ok((info, place)) = self.place(layer, set, part) {
                self.release_place(info, &place);
            }
        }
    }

    /// The set of weights of an expert, and the biases it has.
    fn stored_set(&self, layer: usize, expert: usize) -> Result<(usize, ExpertBiases)> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        if expert >= moe.num_experts() {
            return Err(Error::UnknownExpert { layer, expert, count: moe.num_experts() });
        }
        Ok((moe.stored(expert), moe.biases))
    }

    /// Where a part of a set of weights is.
    fn place(&self, layer: usize, set: usize, part: ExpertPart) -> Result<(&TensorInfo, Placement)> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let layout = self.expert_layout(layer)?;
        let place = layout.place(self.config.expert_hidden_size(), &moe.stored_widths(), set, part);
        Ok((self.info(&self.family.expert_tensor_name(layer, place.tensor))?, place))
    }

    /// A part of an expert, row-major.
    fn matrix(&self, info: &TensorInfo, place: &Placement) -> Result<RawMatrix<'_>> {
        let matrix = |bytes, dtype| RawMatrix { bytes, dtype, rows: place.rows, cols: place.cols };
        if let Some(weight) = self.quantized.get(&info.name) {
            let bytes = match weight.rows(place) {
                Some((number, rows)) => {
                    let bytes = self.opened(weight, number)?.bf16(rows).ok_or_else(|| weight.no_number())?;
                    self.release_weight(weight, number..number + 1);
                    bytes
                }
                None => {
                    let elements = place.range();
                    let bytes = self.decoded_bytes(weight, 2 * elements.start..2 * elements.end)?;
                    convert::gather(&bytes, place, 2)
                }
            };
            return Ok(matrix(Cow::Owned(bytes), Dtype::BF16));
        }
        let bytes = self.range(info, info.byte_range(&place.range()))?;
        let bytes = match place.is_contiguous() {
            true => bytes,
            false => Cow::Owned(convert::gather(&bytes, place, info.dtype.bitsize() / 8)),
        };
        Ok(matrix(bytes, info.dtype))
    }

    fn release_place(&self, info: &TensorInfo, place: &Placement) {
        let elements = place.range();
        match self.quantized.get(&info.name) {
            Some(_) => self.release_plain(&info.name, 2 * elements.start..2 * elements.end),
            None => self.source.release(info, info.byte_range(&elements)),
        }
    }

    fn unknown_layer(&self, layer: usize) -> Error {
        Error::UnknownLayer { layer, known: self.shape.layers.iter().map(|l| l.layer).collect() }
    }
}

/// The parts that an expert has.
fn parts(biases: ExpertBiases) -> impl Iterator<Item = ExpertPart> {
    ExpertPart::ALL.into_iter().chain(ExpertPart::BIASES).filter(move |part| biases.has(*part))
}
