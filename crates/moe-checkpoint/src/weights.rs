//! The tensors of a model directory: which file holds each, and where.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;

use crate::header::tensor_bytes;
use crate::index::WeightFiles;
use crate::shard::Shard;
use crate::shard_layout::TensorSpec;
use crate::{Error, Result};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Dtype of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub file: Arc<Path>,
    /// Its size in bytes.
    pub bytes: u64,
    /// Position of the file among the shards.
    shard: usize,
    /// Where it starts in the file.
    begin: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product()
    }

    /// What it is without where it is.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }

    /// A tensor that a method makes, in place of one of `file`.
    pub(crate) fn made(spec: TensorSpec, file: &Arc<Path>) -> Result<Self> {
        let Some(bytes) = tensor_bytes(spec.dtype, &spec.shape).filter(|bytes| usize::try_from(*bytes).is_ok()) else {
            let reason = format!("{:?} of shape {:?} is not a whole number of bytes", spec.dtype, spec.shape);
            return Err(Error::InvalidTensorSpec { tensor: spec.name, reason });
        };
        let TensorSpec { name, dtype, shape } = spec;
        Ok(Self { name, dtype, shape, file: file.clone(), bytes, shard: 0, begin: 0 })
    }

    pub(crate) fn shard(&self) -> usize {
        self.shard
    }

    pub(crate) fn range(&self) -> Range<usize> {
        self.begin..self.begin + self.bytes as usize
    }

    pub(crate) fn begin(&self) -> usize {
        self.begin
    }

    /// Bytes, within a tensor of a whole number of bytes per element, of a range of its elements.
    pub(crate) fn byte_range(&self, elements: &Range<usize>) -> Range<usize> {
        let size = self.dtype.bitsize() / 8;
        elements.start * size..elements.end * size
    }
}

/// Opens the weight files and checks them against the index.
pub(crate) fn open(dir: &Path) -> Result<(Vec<Shard>, BTreeMap<String, TensorInfo>)> {
    let (index, files) = match WeightFiles::find(dir)? {
        WeightFiles::Single(path) => (None, BTreeMap::from([(path, Vec::new())])),
        WeightFiles::Sharded { index, shards } => (Some(index), shards),
    };
    let owners: BTreeMap<String, PathBuf> =
        files.iter().flat_map(|(path, names)| names.iter().map(|name| (name.clone(), path.clone()))).collect();
    let mut shards = Vec::with_capacity(files.len());
    let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
    for (path, indexed) in files {
        let (shard, header) = Shard::open(&path)?;
        let file: Arc<Path> = Arc::from(path.as_path());
        for tensor in header {
            let info = TensorInfo {
                bytes: (tensor.end - tensor.begin) as u64,
                dtype: tensor.dtype,
                shape: tensor.shape,
                file: file.clone(),
                shard: shards.len(),
                begin: tensor.begin,
                name: tensor.name,
            };
            // Where the index names a shard for a tensor, a copy elsewhere does not count.
            if owners.get(&info.name).is_some_and(|owner| **owner != *path) {
                continue;
            }
            if let Some(first) = tensors.get(&info.name) {
                let (first, second) = (first.file.to_path_buf(), path);
                return Err(Error::TensorInTwoShards { tensor: info.name, first, second });
            }
            tensors.insert(info.name.clone(), info);
        }
        if let Some(index) = &index {
            for tensor in indexed {
                if tensors.get(&tensor).is_none_or(|info| info.shard != shards.len()) {
                    // A later shard may hold it, but the index says this one.
                    return Err(Error::IndexTensorAbsent { index: index.clone(), shard: path, tensor });
                }
            }
        }
        shards.push(shard);
    }
    Ok((shards, tensors))
}

/// Whether a directory's tensors all have plain numbers, none of them a quantized weight.
pub(crate) fn are_plain(dir: &Path) -> bool {
    open(dir).is_ok_and(|(_, tensors)| tensors.values().all(is_plain))
}

/// Whether a tensor has plain numbers.
pub(crate) fn is_plain(info: &TensorInfo) -> bool {
    matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::I64)
}
