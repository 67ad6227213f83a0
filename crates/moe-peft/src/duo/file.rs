//! A choice of sizes beside a checkpoint.
//!
//! `duo.safetensors`: per MoE layer `layers.L.duo` f32 `[1, H + 1]`, weight and bias of its score. The metadata entry
//! `duo` is JSON: `version` 1, `big` and `small`.

use std::path::Path;

use moe_core::Model;
use serde::{Deserialize, Serialize};

use super::{Duo, DuoTuning, name};
use crate::{
    Result,
    array_file::{ArrayReader, ArrayWriter, read},
};

const KEY: &str = "duo";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    big: usize,
    small: usize,
}

impl Duo {
    /// Name of the file in the directory of a checkpoint.
    pub const FILE: &str = "duo.safetensors";

    /// Writes the scores.
    ///
    /// # Errors
    /// What keeps the file from being written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut arrays = ArrayWriter::default();
        let (mut big, mut small) = (0, 0);
        for (&layer, rule) in &self.layers {
            arrays.add(name(layer), &rule.live().shape(), &rule.live().to_vec());
            (big, small) = rule.sizes();
        }
        arrays.write(path.as_ref(), KEY, &Header { big, small })
    }

    /// Reads a file of [`save`](Self::save) for a model; the choice is hard.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::File`](crate::Error::File) for a file of something else or of another model,
    /// [`Error::Io`](crate::Error::Io) if it cannot be read.
    pub fn load(path: impl AsRef<Path>, model: &Model) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read(path)?;
        let (header, arrays): (Header, _) = ArrayReader::new(path, &bytes, KEY)?;
        let method = DuoTuning { small: header.small, ..DuoTuning::default() };
        let read = Self::with(model, &method, header.big, &mut |name, hidden| arrays.need(name, &[1, hidden + 1]))?;
        arrays.only(|found| read.layers.keys().any(|layer| name(*layer) == found))?;
        Ok(read)
    }
}
