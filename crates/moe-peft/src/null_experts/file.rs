//! Null experts beside a checkpoint.
//!
//! `null_experts.safetensors`: per MoE layer `layers.L.null_experts` f32 `[m, H]`. The metadata entry `null_experts` is
//! JSON: `version` 1 and `top_k`, the experts per token among all.

use std::path::Path;
use std::sync::{Arc, RwLock};

use moe_core::Model;
use serde::{Deserialize, Serialize};

use super::{NullExperts, NullLayer, name};
use crate::{
    Live, Result,
    array_file::{ArrayReader, ArrayWriter, malformed, read},
};

const KEY: &str = "null_experts";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    top_k: usize,
}

impl NullExperts {
    /// Name of the file in the directory of a checkpoint.
    pub const FILE: &str = "null_experts.safetensors";

    /// Writes the rows of the null experts.
    ///
    /// # Errors
    /// What keeps the file from being written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut arrays = ArrayWriter::default();
        let mut top_k = 1;
        for (&layer, rule) in &self.layers {
            arrays.add(name(layer), &rule.rows().shape(), &rule.rows().to_vec());
            top_k = rule.top_k();
        }
        arrays.write(path.as_ref(), KEY, &Header { top_k })
    }

    /// Reads a file of [`save`](Self::save) for a model.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::File`](crate::Error::File) for a file of something else or of another model,
    /// [`Error::Io`](crate::Error::Io) if it cannot be read.
    pub fn load(path: impl AsRef<Path>, model: &Model) -> Result<Self> {
        let (path, config) = (path.as_ref(), model.config());
        Self::check(config)?;
        let bytes = read(path)?;
        let (header, arrays): (Header, _) = ArrayReader::new(path, &bytes, KEY)?;
        let balance = Arc::new(RwLock::new(0.0));
        let mut layers = std::collections::BTreeMap::new();
        for (layer, moe) in (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?))) {
            let nulls = arrays.shape(&name(layer)).and_then(|shape| shape.first().copied()).unwrap_or(0);
            let shape = [nulls, config.hidden_size];
            let rows = arrays.need(&name(layer), &shape)?;
            if !(1..=moe.num_experts()).contains(&header.top_k) {
                return Err(malformed(path, "top_k", header.top_k, format!("1 to {}", moe.num_experts())));
            }
            let live = Live::new(name(layer), shape, rows, model.device())?;
            layers
                .insert(layer, Arc::new(NullLayer::new(layer, moe.num_experts(), header.top_k, live, balance.clone())));
        }
        arrays.only(|found| layers.keys().any(|layer| name(*layer) == found))?;
        Ok(Self { layers, balance })
    }
}
