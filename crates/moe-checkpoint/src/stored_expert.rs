//! One routed expert in memory as its checkpoint stores it.

use std::borrow::Cow;

use safetensors::Dtype;

use crate::expert_bytes::RawMatrix;
use crate::experts::{ExpertLayout, ExpertPart, ExpertTensor};
use crate::formats::matrix::{Part, Rows};
use crate::{Checkpoint, ExpertWeights, Result};

/// The bytes of one routed expert as a checkpoint stores them: codes and scales of one that is quantized expert by
/// expert, BF16 or whatever the files hold of others. What a cache of experts keeps.
#[derive(Clone, Debug)]
pub struct StoredExpert {
    parts: Vec<(ExpertPart, StoredPart)>,
}

#[derive(Clone, Debug)]
enum StoredPart {
    Plain { bytes: Vec<u8>, dtype: Dtype, rows: usize, cols: usize },
    Packed(Vec<(Dtype, Vec<u8>)>),
}

impl StoredExpert {
    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        let of = |part: &StoredPart| match part {
            StoredPart::Plain { bytes, .. } => bytes.len(),
            StoredPart::Packed(tensors) => tensors.iter().map(|(_, bytes)| bytes.len()).sum(),
        };
        self.parts.iter().map(|(_, part)| of(part) as u64).sum()
    }
}

impl Checkpoint {
    /// Reads the bytes of a routed expert, and gives the pages of the file back.
    ///
    /// # Errors
    /// As [`Checkpoint::expert`].
    pub fn stored_expert(&self, layer: usize, expert: usize) -> Result<StoredExpert> {
        let alone = self.expert_layout(layer)? == ExpertLayout::PerExpert && !self.grouped();
        let mut parts = Vec::new();
        for part in [
            ExpertPart::Gate,
            ExpertPart::Up,
            ExpertPart::Down,
            ExpertPart::GateBias,
            ExpertPart::UpBias,
            ExpertPart::DownBias,
        ] {
            if let Some(name) = packed_name(self, layer, expert, part).filter(|_| alone)
                && let Some(weight) = self.quantized_weight(&name).filter(|weight| weight.stack == 1)
            {
                let read = |name: &String| Ok((self.info(name)?.dtype, self.bytes(name)?.into_owned()));
                parts.push((part, StoredPart::Packed(weight.parts.iter().map(read).collect::<Result<_>>()?)));
                weight.parts.iter().try_for_each(|name| self.release_tensor(name))?;
                continue;
            }
            if let Some(RawMatrix { bytes, dtype, rows, cols }) = self.expert_part(layer, expert, part)? {
                parts.push((part, StoredPart::Plain { bytes: bytes.into_owned(), dtype, rows, cols }));
            }
        }
        self.release_expert(layer, expert)?;
        Ok(StoredExpert { parts })
    }

    /// The weights of a routed expert from [its bytes](Checkpoint::stored_expert): those of [`Checkpoint::expert`].
    ///
    /// # Errors
    /// [`Error::NotANumber`](crate::Error::NotANumber) for codes or scales that are none.
    pub fn decode_expert(&self, layer: usize, expert: usize, stored: &StoredExpert) -> Result<ExpertWeights> {
        let mut weights = ExpertWeights { hidden: self.config().expert_hidden_size(), ..ExpertWeights::default() };
        for (part, stored) in &stored.parts {
            let values = match stored {
                StoredPart::Plain { bytes, dtype, rows, cols } => {
                    RawMatrix { bytes: Cow::Borrowed(bytes), dtype: *dtype, rows: *rows, cols: *cols }.to_f32()
                }
                StoredPart::Packed(tensors) => {
                    let name = packed_name(self, layer, expert, *part).unwrap_or_default();
                    let Some(weight) = self.quantized_weight(&name) else { continue };
                    let mut tensors = tensors.iter();
                    let next = |_: &str, _: usize, _: usize| {
                        let (dtype, bytes) = tensors.next().map_or((Dtype::U8, &[][..]), |(d, b)| (*d, &b[..]));
                        Ok(Part { dtype, bytes: Cow::Borrowed(bytes) })
                    };
                    let matrix = weight.open(0, next)?;
                    let bytes = matrix.bf16(Rows::range(0..matrix.rows)).ok_or_else(|| weight.no_number())?;
                    let (rows, cols) = weight.dims;
                    RawMatrix { bytes: Cow::Owned(bytes), dtype: Dtype::BF16, rows, cols }.to_f32()
                }
            };
            match part {
                ExpertPart::Gate => weights.gate = values,
                ExpertPart::Up => weights.up = values,
                ExpertPart::Down => weights.down = values,
                ExpertPart::GateBias => weights.gate_bias = Some(values),
                ExpertPart::UpBias => weights.up_bias = Some(values),
                ExpertPart::DownBias => weights.down_bias = Some(values),
            }
        }
        weights.width = weights.gate.len() / weights.hidden.max(1);
        Ok(weights)
    }
}

/// The tensor of a part, where experts are stored one by one.
fn packed_name(model: &Checkpoint, layer: usize, expert: usize, part: ExpertPart) -> Option<String> {
    let tensor = match part {
        ExpertPart::Gate => ExpertTensor::Gate(expert),
        ExpertPart::Up => ExpertTensor::Up(expert),
        ExpertPart::Down => ExpertTensor::Down(expert),
        _ => return None,
    };
    Some(model.expert_tensor_name(layer, tensor))
}
