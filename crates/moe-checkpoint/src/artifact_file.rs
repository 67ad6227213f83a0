//! Reading and writing artifact files: safetensors with one JSON document in the metadata, written atomically.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, TensorView, View};
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
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(|source| Error::io(&file.path, source))?;
    file.finish()
}

/// A file that has its name once it is whole: until [`AtomicFile::finish`] it is `.NAME.tmp` beside its place, and
/// dropped before that it is removed. What a killed process left there is written over by the next one that writes the
/// same file; while another writer is at it, this one has a file of its own.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    finished: bool,
}

impl AtomicFile {
    /// Begins the file.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let (file, temporary) = temporary_file(&path).map_err(|source| Error::io(&path, source))?;
        Ok(Self { path, temporary, file, finished: false })
    }

    /// The path until it is finished, for what writes to a path.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Makes what was written durable, and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; a file of that name is untouched then.
    pub fn finish(mut self) -> Result<()> {
        let named = self.file.sync_all().and_then(|()| fs::rename(&self.temporary, &self.path));
        named.map_err(|source| Error::io(&self.path, source))?;
        self.finished = true;
        // The rename itself is durable only once the directory is; not every file system lets a directory be synced.
        let _ = File::open(directory_of(&self.path)).and_then(|directory| directory.sync_all());
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: the error that matters is an earlier one.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// An empty file beside `path`, locked where that can be.
fn temporary_file(path: &Path) -> std::io::Result<(File, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let common = directory_of(path).join(format!(".{name}{TEMPORARY_SUFFIX}"));
    let file = File::options().write(true).create(true).truncate(false).open(&common)?;
    if file.try_lock().is_ok() && is_at(&file, &common) {
        file.set_len(0)?;
        return Ok((file, common));
    }
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let own = directory_of(path).join(format!(".{name}.{}-{unique}{TEMPORARY_SUFFIX}", std::process::id()));
    Ok((File::create(&own)?, own))
}

/// Whether the file still has this name: another writer may have finished it between opening and locking.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Elsewhere nothing tells, so that every writer has a file of its own.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    false
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

/// Writes a safetensors file tensor by tensor, with the bytes that [`safetensors::serialize`] gives, and tells how many
/// they are. `safetensors::serialize_to_file` begins a file under a name drawn at random, which a killed process leaves
/// behind.
///
/// # Errors
/// What `out` says, and tensors that no header can have.
pub fn write_safetensors<V: View>(
    out: impl Write,
    tensors: impl IntoIterator<Item = (String, V)>,
    metadata: Option<HashMap<String, String>>,
) -> std::io::Result<u64> {
    let mut tensors: Vec<(String, V)> = tensors.into_iter().collect();
    tensors.sort_by(|(a_name, a), (b_name, b)| b.dtype().cmp(&a.dtype()).then_with(|| a_name.cmp(b_name)));
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let begin = end;
        end += tensor.data_len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let header = Metadata::new(metadata, infos.collect()).map_err(std::io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    let mut out = BufWriter::new(out);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (_, tensor) in &tensors {
        out.write_all(&tensor.data())?;
    }
    out.flush()?;
    Ok((size_of::<u64>() + header.len() + end) as u64)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_killed_writer_left_is_written_over_and_nothing_stays_beside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        // As a killed process leaves it: longer than what comes.
        std::mem::forget({
            let mut killed = AtomicFile::create(&path).unwrap();
            killed.write_all(b"half of something long").unwrap();
            killed.file.unlock().unwrap();
            killed
        });
        assert_eq!(names(directory.path()), [".a.json.tmp"]);
        write_atomic(&path, b"{}").unwrap();
        assert_eq!((names(directory.path()), fs::read(&path).unwrap()), (vec!["a.json".into()], b"{}".to_vec()));
    }

    #[test]
    fn tensors_written_one_by_one_are_the_bytes_of_safetensors() {
        let bytes: Vec<u8> = (0..48).collect();
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let tensors = || {
            [
                ("b", view(Dtype::F32, &[2, 3], &bytes[..24])),
                ("c", view(Dtype::F64, &[2], &bytes[24..40])),
                ("a", view(Dtype::F32, &[2], &bytes[40..])),
                ("none", view(Dtype::U8, &[3, 0], &[])),
            ]
            .map(|(name, view)| (name.to_string(), view))
        };
        for metadata in [None, Some(HashMap::from([("key".to_string(), "{\"é\": 1}".to_string())]))] {
            let expected = safetensors::serialize(tensors(), metadata.clone()).unwrap();
            let mut written = Vec::new();
            let length = write_safetensors(&mut written, tensors(), metadata).unwrap();
            assert_eq!((length, written), (expected.len() as u64, expected));
        }
    }

    #[test]
    fn writers_of_one_file_do_not_meet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let (mut first, mut second) = (AtomicFile::create(&path).unwrap(), AtomicFile::create(&path).unwrap());
        assert_ne!(first.temporary(), second.temporary());
        first.write_all(b"first").unwrap();
        second.write_all(b"second").unwrap();
        first.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        second.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        drop(AtomicFile::create(&path).unwrap());
        assert_eq!((names(directory.path()), fs::read(&path).unwrap()), (vec!["a".into()], b"second".to_vec()));
        // Many at a time: one of them is there, whole.
        let texts: Vec<Vec<u8>> = (0..8u8).map(|n| vec![b'a' + n; 100_000]).collect();
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| (0..20).for_each(|_| write_atomic(&path, text).unwrap()));
            }
        });
        assert!(texts.contains(&fs::read(&path).unwrap()));
        assert_eq!(names(directory.path()), ["a"]);
    }
}
