//! Task vectors: what fine-tuning changed, tensor by tensor.

use std::borrow::Cow;
use std::path::Path;

use moe_checkpoint::{Checkpoint, Dtype, SafetensorsFile, TensorSpec, decode_f32};
use serde_json::Value;

use crate::{Error, Result};

/// Elements that are worked on at a time.
pub(crate) const CHUNK: usize = 1 << 18;

/// Name of the weights of an adapter.
pub(crate) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// Name of the config of an adapter.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Where a task vector comes from.
#[derive(Clone, Copy, Debug)]
pub enum TaskVector<'a> {
    /// The difference of a fine-tuned checkpoint from its base, of the same tensors.
    Checkpoints {
        /// What was fine-tuned.
        base: &'a Checkpoint,
        /// What came of it.
        tuned: &'a Checkpoint,
    },
    /// An adapter in PEFT's format: its tensors less a constant, which is 0 for LoRA (A and B are themselves the task
    /// vector) and 1 for (IA)3.
    Adapter {
        /// The directory.
        directory: &'a Path,
        /// What every element starts from.
        start: f32,
    },
}

/// A task vector whose files are open.
pub(crate) enum Opened<'a> {
    Checkpoints { base: &'a Checkpoint, tuned: &'a Checkpoint, tensors: Vec<TensorSpec> },
    Adapter { file: SafetensorsFile, start: f32, config: Value, tensors: Vec<TensorSpec> },
}

impl<'a> TaskVector<'a> {
    /// Opens and checks what can be checked without reading weights.
    pub(crate) fn open(self) -> Result<Opened<'a>> {
        match self {
            Self::Checkpoints { base, tuned } => {
                for checkpoint in [base, tuned] {
                    if let Some(quantization) = checkpoint.quantization() {
                        let what = format!("a delta of {quantization} weights in {}", checkpoint.dir().display());
                        return Err(Error::Unsupported(what));
                    }
                }
                let dir = tuned.dir().display();
                if let Some(extra) = tuned.tensors().find(|info| base.info(&info.name).is_err()) {
                    return Err(Error::input(format!("tensor {} of {dir}", extra.name), "one", "none, as in the base"));
                }
                let mut tensors = Vec::new();
                for info in base.tensors() {
                    let other = tuned.info(&info.name)?;
                    if other.shape != info.shape {
                        let what = format!("shape of {} in {dir}", info.name);
                        return Err(Error::input(what, format!("{:?}", other.shape), format!("{:?}", info.shape)));
                    }
                    tensors.push(spec(&other.name, other.dtype, &other.shape));
                }
                Ok(Opened::Checkpoints { base, tuned, tensors })
            }
            Self::Adapter { directory, start } => {
                let file = SafetensorsFile::open(directory.join(ADAPTER_WEIGHTS))?;
                let path = directory.join(ADAPTER_CONFIG);
                let text = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
                let config = serde_json::from_slice(&text).map_err(|error| Error::File {
                    path,
                    what: "contents".into(),
                    found: error.to_string(),
                    expected: "a JSON object".into(),
                })?;
                let tensors: Vec<TensorSpec> = file.tensors().cloned().collect();
                for tensor in &tensors {
                    if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                        let what = format!("dtype of {} in {}", tensor.name, file.path().display());
                        return Err(Error::input(what, tensor.dtype.to_string(), "F32, F16 or BF16"));
                    }
                }
                Ok(Opened::Adapter { file, start, config, tensors })
            }
        }
    }
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_string(), dtype, shape: shape.to_vec() }
}

/// Elements of a tensor.
pub(crate) fn elements(tensor: &TensorSpec) -> u64 {
    tensor.shape.iter().map(|size| *size as u64).product()
}

impl Opened<'_> {
    /// Tensors of the fine-tuned side, sorted by name.
    pub fn tensors(&self) -> &[TensorSpec] {
        match self {
            Self::Checkpoints { tensors, .. } | Self::Adapter { tensors, .. } => tensors,
        }
    }

    /// Bytes of a tensor of the fine-tuned side.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        Ok(match self {
            Self::Checkpoints { tuned, .. } => tuned.bytes(name)?,
            Self::Adapter { file, .. } => file.bytes(name)?.into(),
        })
    }

    /// Dtype and bytes of a tensor of the base, if there is one.
    pub fn base(&self, name: &str) -> Result<Option<(Dtype, Cow<'_, [u8]>)>> {
        match self {
            Self::Checkpoints { base, .. } => Ok(Some((base.info(name)?.dtype, base.bytes(name)?))),
            Self::Adapter { .. } => Ok(None),
        }
    }

    /// Gives the pages of a tensor back.
    pub fn release(&self, name: &str) -> Result<()> {
        match self {
            Self::Checkpoints { base, tuned, .. } => {
                base.release_tensor(name)?;
                tuned.release_tensor(name)?;
            }
            Self::Adapter { file, .. } => file.release(),
        }
        Ok(())
    }

    /// Calls `f` with the elements of the task vector of one tensor after the other, in order, by pieces of at most
    /// [`CHUNK`].
    pub fn stream(&self, mut f: impl FnMut(&TensorSpec, &[f32]) -> Result<()>) -> Result<()> {
        let (mut after, mut before) = (Vec::new(), Vec::new());
        for tensor in self.tensors() {
            let (bytes, base) = (self.bytes(&tensor.name)?, self.base(&tensor.name)?);
            let size = tensor.dtype.bitsize() / 8;
            let mut base = base.as_ref().map(|(dtype, bytes)| (*dtype, bytes.chunks(CHUNK * dtype.bitsize() / 8)));
            for piece in bytes.chunks(CHUNK * size) {
                after.clear();
                before.clear();
                let mut read = decode_f32(tensor.dtype, piece, &mut after);
                match (&mut base, self) {
                    (Some((dtype, pieces)), _) => {
                        read &= decode_f32(*dtype, pieces.next().unwrap_or_default(), &mut before);
                        after.iter_mut().zip(&before).for_each(|(after, before)| *after -= before);
                    }
                    (None, Self::Adapter { start, .. }) if *start != 0.0 => {
                        after.iter_mut().for_each(|after| *after -= start);
                    }
                    _ => {}
                }
                if !read {
                    let found = tensor.dtype.to_string();
                    return Err(Error::input(format!("dtype of {}", tensor.name), found, "F32, F16 or BF16"));
                }
                if let Some(bad) = after.iter().find(|value| !value.is_finite()) {
                    return Err(Error::input(format!("task vector of {}", tensor.name), bad, "finite numbers"));
                }
                f(tensor, &after)?;
            }
            self.release(&tensor.name)?;
        }
        Ok(())
    }
}
