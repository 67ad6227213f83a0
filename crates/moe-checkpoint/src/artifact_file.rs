//! Reading and writing artifact files: safetensors with one JSON document in the metadata, written atomically.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Suffix of files that are being written. A killed process leaves them behind; they never count as data.
pub(crate) const TEMPORARY_SUFFIX: &str = ".tmp";

/// Writes a file so that `path` either keeps what it had or holds all of `bytes`: temporary file beside it, fsync,
/// rename, fsync of the directory.
///
/// # Errors
/// [`Error::Io`] with the path; `path` is untouched then.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let path = path.as_ref();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = directory.join(format!(".{name}.{}-{unique}{TEMPORARY_SUFFIX}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The rename itself is durable only once the directory is; not every file system lets a directory be synced.
        File::open(directory).and_then(|d| d.sync_all()).or(Ok(()))
    };
    write().map_err(|source| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
        Error::Io { path: path.to_path_buf(), source }
    })
}

/// What sort of artifact a file is: its metadata key and the version written and at most read.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    pub name: &'static str,
    pub key: &'static str,
    pub version: u64,
}

#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

/// Parses a versioned JSON document, telling a newer version from a malformed file.
pub(crate) fn parse_versioned<T: DeserializeOwned>(path: &Path, kind: Kind, json: &str) -> Result<T> {
    let malformed = |error: serde_json::Error| Error::malformed(path, kind.name, error.to_string());
    let Versioned { version } = serde_json::from_str(json).map_err(malformed)?;
    if version == 0 || version > kind.version {
        return Err(Error::ArtifactVersion {
            path: path.to_path_buf(),
            kind: kind.name,
            found: version,
            supported: kind.version,
        });
    }
    serde_json::from_str(json).map_err(malformed)
}

/// One tensor to write: name, dtype, shape, little-endian bytes.
pub(crate) type OutTensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Writes a file beside its place, as `*.tmp`, and renames it: whole or not at all for whoever reads it after this
/// process was killed. It is not synced, so that it costs no wait for the disk; after a power cut it may be cut short.
///
/// # Errors
/// What the file system says.
pub fn write_renamed(path: impl AsRef<Path>, parts: &[&[u8]]) -> std::io::Result<()> {
    let path = path.as_ref();
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    fs::rename(&temporary, path)
}

/// Writes tensors and one JSON document under the key of `kind`.
pub(crate) fn write_tensors<M: Serialize>(path: &Path, kind: Kind, meta: &M, tensors: &[OutTensor]) -> Result<()> {
    write_atomic(path, &tensor_bytes(path, kind, meta, tensors)?)
}

/// What [`write_tensors`] writes.
pub(crate) fn tensor_bytes<M: Serialize>(path: &Path, kind: Kind, meta: &M, tensors: &[OutTensor]) -> Result<Vec<u8>> {
    let internal = |reason: String| Error::malformed(path, kind.name, reason);
    let json = serde_json::to_string(meta).map_err(|error| internal(error.to_string()))?;
    let mut views = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, bytes) in tensors {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| internal(error.to_string()))?;
        views.push((name.as_str(), view));
    }
    let metadata = HashMap::from([(kind.key.to_string(), json)]);
    safetensors::serialize(views, Some(metadata)).map_err(|error| internal(error.to_string()))
}

/// A file read into memory, to be parsed by [`TensorFile::parse`].
pub(crate) struct TensorFile {
    path: PathBuf,
    kind: Kind,
    bytes: Vec<u8>,
}

impl TensorFile {
    pub fn read(path: &Path, kind: Kind) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        Ok(Self { path: path.to_path_buf(), kind, bytes })
    }

    /// The JSON document and the tensors.
    pub fn parse<M: DeserializeOwned>(&self) -> Result<(M, Tensors<'_>)> {
        let malformed = |reason: String| Error::malformed(&self.path, self.kind.name, reason);
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|error| malformed(error.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&self.bytes).map_err(|error| malformed(error.to_string()))?;
        let json = header.metadata().as_ref().and_then(|m| m.get(self.kind.key)).ok_or_else(|| {
            malformed(format!("the metadata has no key `{}`: this is another sort of file", self.kind.key))
        })?;
        let meta = parse_versioned(&self.path, self.kind, json)?;
        Ok((meta, Tensors { path: &self.path, kind: self.kind, tensors }))
    }
}

/// The tensors of an artifact file, read with their shape checked.
pub(crate) struct Tensors<'a> {
    path: &'a Path,
    kind: Kind,
    tensors: SafeTensors<'a>,
}

impl Tensors<'_> {
    /// An error about this file.
    pub fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::malformed(self.path, self.kind.name, reason)
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    /// Rows of a matrix, whatever its columns.
    pub fn rows(&self, name: &str) -> Result<usize> {
        let view = self.tensors.tensor(name).map_err(|_| self.malformed(format!("tensor `{name}` is missing")))?;
        match view.shape() {
            [rows, _] => Ok(*rows),
            found => Err(self.malformed(format!("tensor `{name}` has shape {found:?}, expected a matrix"))),
        }
    }

    fn checked(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<TensorView<'_>> {
        let view = self.tensors.tensor(name).map_err(|_| self.malformed(format!("tensor `{name}` is missing")))?;
        if view.shape() != shape {
            let found = view.shape();
            return Err(self.malformed(format!("tensor `{name}` has shape {found:?}, expected {shape:?}")));
        }
        if !dtypes.contains(&view.dtype()) {
            let found = view.dtype();
            return Err(self.malformed(format!("tensor `{name}` has dtype {found:?}, expected one of {dtypes:?}")));
        }
        Ok(view)
    }

    /// An f32 tensor.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let view = self.checked(name, shape, &[Dtype::F32])?;
        Ok(view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// An f32 or f64 tensor, as f64.
    pub fn f64(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        let view = self.checked(name, shape, &[Dtype::F32, Dtype::F64])?;
        Ok(match view.dtype() {
            Dtype::F32 => view.data().as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            _ => view.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        })
    }

    /// An i64 tensor.
    pub fn i64(&self, name: &str, shape: &[usize]) -> Result<Vec<i64>> {
        let view = self.checked(name, shape, &[Dtype::I64])?;
        Ok(view.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
    }
}
