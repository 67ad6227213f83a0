//! Biases and condensers beside a checkpoint.
//!
//! `condensers.safetensors`: per MoE layer `layers.L.bias` f32 `[E]`, `layers.L.usage` f64 `[E]`, `layers.L.routed` u64
//! `[E]` and, once selected, `layers.L.condensers` u32 `[r]`, ascending; `r` may be 0. The metadata entry `condensers`
//! is JSON: `version` 1 and `options` as [`CondenserOptions`].

use std::{collections::BTreeMap, path::Path};

use moe_checkpoint::ModelConfig;
use serde::{Deserialize, Serialize};

use super::{CondenserLayer, CondenserOptions, Condensers};
use crate::{
    Result,
    array_file::{ArrayReader, ArrayWriter, read},
};

const KEY: &str = "condensers";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    options: CondenserOptions,
}

impl Condensers {
    /// Name of the file in the directory of a checkpoint.
    pub const FILE: &str = "condensers.safetensors";

    /// Writes biases, uses and condensers. Use counted since the last step is not among them.
    ///
    /// # Errors
    /// What keeps the file from being written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut arrays = ArrayWriter::default();
        for (&layer, rule) in &self.layers {
            let CondenserLayer { bias, usage, routed, condensers } = rule.learnt();
            arrays.add(format!("layers.{layer}.bias"), &[bias.len()], &bias);
            arrays.add(format!("layers.{layer}.usage"), &[usage.len()], &usage);
            arrays.add(format!("layers.{layer}.routed"), &[routed.len()], &routed);
            if let Some(condensers) = condensers {
                arrays.add(format!("layers.{layer}.condensers"), &[condensers.len()], &condensers);
            }
        }
        arrays.write(path.as_ref(), KEY, &Header { options: self.options() })
    }

    /// Reads a file of [`save`](Self::save) for a model with this configuration.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::File`](crate::Error::File) and [`Error::Input`](crate::Error::Input) for a file
    /// of something else or of another model, [`Error::Io`](crate::Error::Io) if it cannot be read.
    pub fn load(path: impl AsRef<Path>, config: &ModelConfig) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read(path)?;
        let (header, arrays): (Header, _) = ArrayReader::new(path, &bytes, KEY)?;
        let all = Self::new(config, header.options)?;
        let mut layers = BTreeMap::new();
        for (&layer, rule) in &all.layers {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let shape = [rule.experts()];
            let condensers = match arrays.shape(&name("condensers")) {
                Some(shape) => arrays.get(&name("condensers"), &[shape.iter().product()])?,
                None => None,
            };
            let (bias, usage) = (arrays.need(&name("bias"), &shape)?, arrays.need(&name("usage"), &shape)?);
            let routed = arrays.need(&name("routed"), &shape)?;
            layers.insert(layer, CondenserLayer { bias, usage, routed, condensers });
        }
        arrays.only(|name| {
            let layer = name.strip_prefix("layers.").and_then(|name| name.split('.').next()?.parse().ok());
            layer.is_some_and(|layer: usize| all.layers.contains_key(&layer))
        })?;
        all.restore(layers)?;
        Ok(all)
    }

    /// Reads the file in the directory of a checkpoint, if there is one.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn beside(dir: impl AsRef<Path>, config: &ModelConfig) -> Result<Option<Self>> {
        let path = dir.as_ref().join(Self::FILE);
        if path.exists() { Self::load(path, config).map(Some) } else { Ok(None) }
    }
}
