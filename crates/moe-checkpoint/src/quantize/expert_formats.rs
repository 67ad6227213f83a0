//! Formats of single experts: a model in several.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::WeightFormat;
use crate::experts::ExpertPart;
use crate::{Checkpoint, Error, Result};

/// The format of every routed expert, where they differ (mixed precision).
///
/// Engines read several formats in one checkpoint of compressed-tensors alone, by groups of its config: FP8 per row,
/// MXFP4, NVFP4 and integers, for engines that look up the scheme of every module. transformers 5.24 does not: it reads
/// all experts in the format of the first group that names experts, without an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExpertFormats(Vec<ExpertFormat>);

/// The format of some routed experts of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertFormat {
    /// Decoder layer.
    pub layer: usize,
    /// Experts, ascending.
    pub experts: Vec<usize>,
    /// Their format; none where they stay as they are.
    pub format: Option<WeightFormat>,
}

impl ExpertFormats {
    /// Every routed expert of a model once, in any order.
    ///
    /// # Errors
    /// [`Error::Quantize`] for an expert that is missing, named twice or not there, and for formats that no engine
    /// reads side by side.
    pub fn new(model: &Checkpoint, formats: Vec<ExpertFormat>) -> Result<Self> {
        let refused = |reason: String| Err(Error::Quantize { format: "mixed precision".into(), reason });
        let mut left: BTreeSet<(usize, usize)> = model
            .shape()
            .layers
            .iter()
            .flat_map(|layer| (0..layer.num_experts()).map(|expert| (layer.layer, expert)))
            .collect();
        for ExpertFormat { layer, experts, .. } in &formats {
            for expert in experts {
                if !left.remove(&(*layer, *expert)) {
                    return refused(format!("layer {layer}, expert {expert}: expected every expert of the model once"));
                }
            }
        }
        if let Some((layer, expert)) = left.first() {
            return refused(format!("layer {layer}, expert {expert} has no format"));
        }
        let other = formats.iter().filter_map(|group| group.format.as_ref()).find(|format| !format.is_mixable());
        if let Some(format) = other {
            let reason = format!(
                "{format} is read in a checkpoint of its own alone: choose among fp8_channels, mxfp4, nvfp4, integers"
            );
            return refused(reason);
        }
        Ok(Self(formats))
    }

    /// Groups that were made for a model and are [checked](ExpertFormats::new) when it is quantized.
    pub fn listed(formats: Vec<ExpertFormat>) -> Self {
        Self(formats)
    }

    /// The groups.
    pub fn groups(&self) -> &[ExpertFormat] {
        &self.0
    }

    /// Formats by layer and expert.
    pub(super) fn by_expert(&self) -> BTreeMap<(usize, usize), Option<WeightFormat>> {
        let each = |group: &ExpertFormat| {
            let (layer, format) = (group.layer, group.format.clone());
            group.experts.clone().into_iter().map(move |expert| ((layer, expert), format.clone()))
        };
        self.0.iter().flat_map(each).collect()
    }
}

impl WeightFormat {
    /// Whether other formats may stand beside it in one checkpoint.
    pub fn is_mixable(&self) -> bool {
        matches!(self, Self::Fp8Channels | Self::Mxfp4 | Self::Nvfp4 | Self::Int { .. } | Self::Ternary)
    }

    /// Bytes that a matrix takes, codes and everything beside them.
    ///
    /// # Errors
    /// [`Error::Quantize`] for sides that the format cannot divide.
    pub fn bytes(&self, rows: usize, cols: usize) -> Result<u64> {
        if let Some(reason) = self.scheme().misfit((rows, cols)) {
            let reason = format!("{reason}; {}", self.way_out());
            return Err(Error::Quantize { format: self.to_string(), reason });
        }
        let size = |spec: &crate::TensorSpec| (spec.shape.iter().product::<usize>() * spec.dtype.bitsize() / 8) as u64;
        Ok(self.stored(".weight", (rows, cols), 1).iter().map(|(spec, _)| size(spec)).sum())
    }

    /// A matrix as a model in this format computes with it: rounded to nearest, decoded, in BF16.
    ///
    /// # Errors
    /// As [`WeightFormat::bytes`].
    pub fn round(&self, values: &[f32], rows: usize, cols: usize) -> Result<Vec<f32>> {
        self.bytes(rows, cols)?;
        let scheme = self.scheme();
        let decoded = scheme.decode(&scheme.encode(values, (rows, cols)));
        Ok(decoded.into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect())
    }
}

/// Bytes of an expert of this width in a format, or in BF16.
///
/// # Errors
/// As [`WeightFormat::bytes`].
pub fn expert_bytes(format: Option<&WeightFormat>, hidden: usize, width: usize) -> Result<u64> {
    let mut bytes = 0;
    for part in ExpertPart::ALL {
        let (rows, cols) = part.dims(hidden, width);
        bytes += match format {
            Some(format) => format.bytes(rows, cols)?,
            None => 2 * (rows * cols) as u64,
        };
    }
    Ok(bytes)
}
