//! Compressed experts in a file.
//!
//! `compressed_experts.safetensors`, f32. Per MoE layer, where experts are no wider than the hidden size,
//! `layers.L.compressed_experts` `[E, 3, H]` as in the reference: factors on gate inputs, on units, of which the first
//! I count, and on up inputs. For wider experts, which that layout cannot hold, `layers.L.compressed_experts.gate` `[E,
//! H]`, `.units` `[E, I]` and `.up` `[E, H]`. The metadata entry `compressed_experts` is JSON: `version` 1 and
//! `auxiliary`.

use std::path::Path;

use moe_core::Model;
use serde::{Deserialize, Serialize};

use super::{CompressedExperts, CompressedLayers, name};
use crate::{
    AdapterSet, Error, Result,
    array_file::{ArrayReader, ArrayWriter, read},
};

const KEY: &str = "compressed_experts";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    auxiliary: usize,
}

impl CompressedLayers {
    /// Name of the file beside a checkpoint.
    pub const FILE: &str = "compressed_experts.safetensors";

    /// Writes the factors, which must be [lent or settled](crate::Bank).
    ///
    /// # Errors
    /// What keeps the file from being written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut arrays = ArrayWriter::default();
        for (&layer, compressed) in &self.layers {
            let (h, i) = (compressed.hidden, compressed.width);
            let experts = compressed.live.shape()[0];
            let values = compressed.live.to_vec();
            let rows = values.chunks_exact(2 * h + i);
            if i <= h {
                let padded = |row: &[f32]| [&row[..h + i], &vec![1.0; h - i], &row[h + i..]].concat();
                let values: Vec<f32> = rows.flat_map(padded).collect();
                arrays.add(name(layer), &[experts, 3, h], &values);
            } else {
                for (part, columns) in [("gate", 0..h), ("units", h..h + i), ("up", h + i..2 * h + i)] {
                    let values: Vec<f32> = rows.clone().flat_map(|row| &row[columns.clone()]).copied().collect();
                    arrays.add(format!("{}.{part}", name(layer)), &[experts, columns.len()], &values);
                }
            }
        }
        arrays.write(path.as_ref(), KEY, &Header { auxiliary: self.auxiliary })
    }

    /// Adds the compressed experts of a file to `set`.
    ///
    /// # Errors
    /// What keeps [`CompressedExperts`] from being installed; [`Error::File`] for a file of something else or of
    /// another model, [`Error::Io`] if it cannot be read.
    pub fn load(path: impl AsRef<Path>, model: &Model, set: &mut AdapterSet) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read(path)?;
        let (header, arrays): (Header, _) = ArrayReader::new(path, &bytes, KEY)?;
        let config = model.config();
        let h = config.expert_hidden_size();
        arrays.only(|array| {
            let known = |layer: usize| array == name(layer) || array.starts_with(&format!("{}.", name(layer)));
            (0..config.layers.len()).any(|layer| config.moe(layer).is_some() && known(layer))
        })?;
        CompressedExperts { auxiliary: header.auxiliary }.install_with(model, set, |layer, [experts, row]| {
            let i = row - 2 * h;
            if i <= h {
                let values: Vec<f32> = arrays.need(&name(layer), &[experts, 3, h])?;
                let row = |row: &[f32]| [&row[..h + i], &row[2 * h..]].concat();
                return Ok(values.chunks_exact(3 * h).flat_map(row).collect());
            }
            let part =
                |part: &str, columns| arrays.need::<f32>(&format!("{}.{part}", name(layer)), &[experts, columns]);
            let (gate, units, up) = (part("gate", h)?, part("units", i)?, part("up", h)?);
            let rows = (0..experts).flat_map(|e| {
                [&gate[e * h..(e + 1) * h], &units[e * i..(e + 1) * i], &up[e * h..(e + 1) * h]].concat()
            });
            Ok::<_, Error>(rows.collect())
        })
    }
}
