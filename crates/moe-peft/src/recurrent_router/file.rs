//! A recurrent router beside a checkpoint.
//!
//! `recurrent_router.safetensors`: `recurrent_router.cell.{input,state}_weight` `[gates r, r]` and `_bias`
//! `[1, gates r]`; per MoE layer `recurrent_router.layers.L.input` `[r, H]` and `.output` `[E, r]`; all f32. The
//! metadata entry `recurrent_router` is JSON: `version` 1 and `options` as [`RecurrentOptions`].

use std::path::Path;

use moe_core::Model;
use serde::{Deserialize, Serialize};

use super::{RecurrentOptions, RecurrentRouter};
use crate::{
    Result,
    array_file::{ArrayReader, ArrayWriter, read},
};

const KEY: &str = "recurrent_router";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    options: RecurrentOptions,
}

impl RecurrentRouter {
    /// Name of the file in the directory of a checkpoint.
    pub const FILE: &str = "recurrent_router.safetensors";

    /// Writes all of its weights.
    ///
    /// # Errors
    /// What keeps the file from being written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut arrays = ArrayWriter::default();
        self.lives().for_each(|live| arrays.add(live.name().to_string(), &live.shape(), &live.to_vec()));
        arrays.write(path.as_ref(), KEY, &Header { options: self.options })
    }

    /// Reads a file of [`save`](Self::save) for a model.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::File`](crate::Error::File) for a file of something else or of another model,
    /// [`Error::Io`](crate::Error::Io) if it cannot be read.
    pub fn load(path: impl AsRef<Path>, model: &Model) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read(path)?;
        let (header, arrays): (Header, _) = ArrayReader::new(path, &bytes, KEY)?;
        let read =
            Self::with(model.config(), header.options, model.device(), &mut |name, shape| arrays.need(name, &shape))?;
        arrays.only(|found| read.lives().any(|live| live.name() == found))?;
        Ok(read)
    }
}
