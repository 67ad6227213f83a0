//! The precision that a base is held in while adapters are trained on it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{QuantizeOptions, Quantized, QuantizedPart, WeightFormat};
use crate::{Checkpoint, Error, Result};

/// What the weights of a base are rounded to before adapters are trained on it (QLoRA, arXiv 2305.14314).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BasePrecision {
    /// NF4, as in the paper: 4.5 bits per weight.
    Nf4,
    /// Symmetric integers of 4 bits, in the largest groups of 128, 64 or 32 that divide the matrices.
    Int4,
    /// Symmetric integers of 6 bits, in groups as with 4.
    Int6,
    /// Symmetric integers of 8 bits, in groups as with 4.
    Int8,
    /// FP8 (E4M3) with a scale per row.
    Fp8,
    /// MXFP4: 4.25 bits per weight.
    Mxfp4,
    /// NVFP4: 4.5 bits per weight.
    Nvfp4,
}

/// Names of precisions.
const NAMES: [(&str, BasePrecision); 7] = [
    ("nf4", BasePrecision::Nf4),
    ("int4", BasePrecision::Int4),
    ("int6", BasePrecision::Int6),
    ("int8", BasePrecision::Int8),
    ("fp8", BasePrecision::Fp8),
    ("mxfp4", BasePrecision::Mxfp4),
    ("nvfp4", BasePrecision::Nvfp4),
];

impl FromStr for BasePrecision {
    type Err = Error;

    /// `nf4`, `int4`, `int6`, `int8`, `fp8`, `mxfp4` or `nvfp4`.
    fn from_str(text: &str) -> Result<Self> {
        NAMES.iter().find(|(name, _)| *name == text).map(|(_, precision)| *precision).ok_or_else(|| {
            let names = NAMES.map(|(name, _)| name).join(", ");
            Error::Quantize { format: text.chars().take(80).collect(), reason: format!("expected one of {names}") }
        })
    }
}

impl fmt::Display for BasePrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(_, precision)| precision == self).map_or("", |(name, _)| name))
    }
}

impl BasePrecision {
    /// The format for a model: groups of integers are the largest that divide its experts.
    pub fn format(self, base: &Checkpoint) -> WeightFormat {
        let hidden = base.config().hidden_size;
        let widths = base.shape().layers.iter().flat_map(|layer| layer.widths.iter().copied());
        let sides: Vec<usize> = widths.chain([hidden]).collect();
        let fits = |size: &usize| sides.iter().all(|side| side.is_multiple_of(*size));
        let group_size = [128, 64, 32].into_iter().find(fits);
        match self {
            Self::Nf4 => WeightFormat::Nf4,
            Self::Int4 => WeightFormat::Int { bits: 4, group_size, symmetric: true },
            Self::Int6 => WeightFormat::Int { bits: 6, group_size, symmetric: true },
            Self::Int8 => WeightFormat::Int { bits: 8, group_size, symmetric: true },
            Self::Fp8 => WeightFormat::Fp8Channels,
            Self::Mxfp4 => WeightFormat::Mxfp4,
            Self::Nvfp4 => WeightFormat::Nvfp4,
        }
    }

    /// The base with experts, dense blocks and attention in this precision, [packed in
    /// memory](Checkpoint::packed_in_memory). Of gpt-oss, whose engines have no other place, the experts alone.
    ///
    /// # Errors
    /// Those of [`Quantized::on`]: widths that the format cannot divide, experts that differ in width.
    pub fn on(self, base: &Arc<Checkpoint>) -> Result<Quantized> {
        let format = self.format(base);
        let fused = format == WeightFormat::Mxfp4 && base.config().model_type == "gpt_oss";
        let part = if fused { QuantizedPart::Experts } else { QuantizedPart::Linear };
        let Quantized { model, report } = Quantized::on(base, &QuantizeOptions { format, part })?;
        Ok(Quantized { model: model.packed_in_memory()?, report })
    }
}
