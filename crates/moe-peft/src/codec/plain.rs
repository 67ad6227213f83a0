//! Plain deltas: what changed, as it is or as differences.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use moe_checkpoint::{Dtype, encode};
use serde::{Deserialize, Serialize};

use super::file::{DeltaCoding, DeltaTensor, DeltaWriter, base_of, io};
use super::report::DeltaReport;
use super::source::{CHUNK, TaskVector, elements};
use crate::{Error, Result};

/// A delta of the tensors that changed and no others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlainDelta {
    /// The tensors as they are now, byte for byte: applying it gives back exactly what was fine-tuned.
    #[default]
    Changed,
    /// Their differences from the base, in this dtype.
    Difference {
        /// F32, F16 or BF16.
        dtype: Dtype,
    },
}

impl PlainDelta {
    /// Writes the delta file, which appears whole or not at all.
    ///
    /// # Errors
    /// As [`ComPeft::encode`](super::ComPeft::encode).
    pub fn encode(&self, from: TaskVector<'_>, to: &Path) -> Result<DeltaReport> {
        if let Self::Difference { dtype } = self
            && !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
        {
            return Err(Error::input("dtype of differences", dtype, "F32, F16 or BF16"));
        }
        let source = from.open()?;
        let mut changed = BTreeSet::new();
        for tensor in source.tensors() {
            let (bytes, base) = (source.bytes(&tensor.name)?, source.base(&tensor.name)?);
            if base.is_none_or(|(dtype, base)| dtype != tensor.dtype || base != bytes) {
                changed.insert(tensor.name.clone());
            }
            source.release(&tensor.name)?;
        }
        let mut writer = DeltaWriter::create(to)?;
        let coding = match *self {
            Self::Changed => {
                for name in &changed {
                    for piece in source.bytes(name)?.chunks(4 * CHUNK) {
                        writer.payload.write_all(piece).map_err(io(to))?;
                    }
                    source.release(name)?;
                }
                DeltaCoding::Changed
            }
            Self::Difference { dtype } => {
                let mut bytes = Vec::new();
                source.stream(|tensor, tau| {
                    if changed.contains(&tensor.name) {
                        bytes.clear();
                        encode(dtype, tau, &mut bytes);
                        writer.payload.write_all(&bytes).map_err(io(to))?;
                    }
                    Ok(())
                })?;
                DeltaCoding::Difference { dtype }
            }
        };
        let tensors: Vec<_> = source.tensors().iter().filter(|tensor| changed.contains(&tensor.name)).collect();
        let count: u64 = tensors.iter().map(|tensor| elements(tensor)).sum();
        let tensors = tensors.into_iter().map(DeltaTensor::from_spec).collect();
        let (table, file_bytes) = writer.finish(base_of(&source), coding, tensors)?;
        Ok(DeltaReport {
            tensors: table.tensors.len(),
            elements: count,
            kept: count,
            sigma: None,
            scale: None,
            payload_bytes: table.payload_bytes,
            file_bytes,
            expected_bytes: None,
            dense_bytes: 2 * count,
        })
    }
}
