//! One safetensors file by itself: an adapter, a saved state.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::shard::Shard;
use crate::{Error, Result, TensorSpec};

/// A safetensors file that is no checkpoint, mapped and read tensor by tensor. Its header is checked when it is opened,
/// as that of a checkpoint is.
pub struct SafetensorsFile {
    path: PathBuf,
    shard: Shard,
    tensors: BTreeMap<String, (TensorSpec, Range<usize>)>,
}

impl SafetensorsFile {
    /// Opens a file; no tensor is read.
    ///
    /// # Errors
    /// Those of a file that is not there, cut short, or whose header contradicts it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (shard, header) = Shard::open(path)?;
        let tensors = header.into_iter().map(|tensor| {
            let (dtype, shape) = (tensor.dtype, tensor.shape);
            (tensor.name.clone(), (TensorSpec { name: tensor.name, dtype, shape }, tensor.begin..tensor.end))
        });
        Ok(Self { path: path.to_path_buf(), shard, tensors: tensors.collect() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.values().map(|(spec, _)| spec)
    }

    /// Dtype and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn tensor(&self, name: &str) -> Result<&TensorSpec> {
        self.find(name).map(|(spec, _)| spec)
    }

    /// The bytes of a tensor, mapped; they stay resident until [`SafetensorsFile::release`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; [`Error::Shortened`] if the file is no longer whole.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (_, range) = self.find(name)?;
        self.shard.bytes(range.clone())
    }

    /// Gives the pages of all tensors back to the system. Views stay valid.
    pub fn release(&self) {
        self.shard.release_all();
    }

    /// An F32, F16 or BF16 tensor, as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::InvalidTensorSpec`] for another dtype.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        let spec = self.tensor(name)?;
        if !crate::convert::decode_f32(spec.dtype, self.bytes(name)?, &mut out) {
            let reason = format!("{:?} in {}, expected F32, F16 or BF16", spec.dtype, self.path.display());
            return Err(Error::InvalidTensorSpec { tensor: name.to_string(), reason });
        }
        Ok(out)
    }

    /// The bits of an F64 tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::InvalidTensorSpec`] for another dtype.
    pub fn f64(&self, name: &str) -> Result<Vec<f64>> {
        let spec = self.tensor(name)?;
        if spec.dtype != Dtype::F64 {
            let reason = format!("{:?} in {}, expected F64", spec.dtype, self.path.display());
            return Err(Error::InvalidTensorSpec { tensor: name.to_string(), reason });
        }
        Ok(self.bytes(name)?.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
    }

    fn find(&self, name: &str) -> Result<&(TensorSpec, Range<usize>)> {
        self.tensors.get(name).ok_or_else(|| Error::NoSuchTensor { tensor: name.to_string(), dir: self.path.clone() })
    }
}

impl std::fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SafetensorsFile").field("path", &self.path).field("tensors", &self.tensors.len()).finish()
    }
}
