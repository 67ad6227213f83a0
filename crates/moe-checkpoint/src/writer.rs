//! Streaming writer of sharded safetensors.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::artifact_file::{TEMPORARY_SUFFIX, write_atomic};
use crate::checkpoint::Checkpoint;
use crate::index::{INDEX_FILE, read_json};
use crate::json::Fields;
use crate::shard_layout::{self, Placed, ShardLayout, TensorSpec};
use crate::{Error, Result};

/// File that tells which plan an unfinished output belongs to.
pub(crate) const RESUME_FILE: &str = ".moe-resume.json";
/// Bytes copied at a time from one checkpoint to another.
const COPY_BYTES: usize = 4 << 20;

/// How a checkpoint is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterOptions {
    /// Most bytes of tensor data per file; a larger tensor gets its own file. 5 GB, as transformers.
    pub max_shard_bytes: u64,
    /// Whatever the content of the tensors follows from (source, plan, options), in any form that two runs write alike.
    /// An unfinished output is only continued if this and the layout are the same.
    pub recipe: String,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { max_shard_bytes: 5_000_000_000, recipe: String::new() }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Weight files, in order.
    pub files: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Elements of all tensors.
    pub parameters: u64,
}

/// Writes tensors that are known by name, dtype and shape beforehand, slice by slice, into shards.
///
/// A shard is written under a temporary name; when its last tensor is complete it is synced and renamed. A later writer
/// on the same directory with the same layout and recipe finds it and does not write it again, so that a process killed
/// at any time loses at most its current shard. Memory is that of one buffer, whatever the sizes.
///
/// Tensors are best written in the order of the specs; any order works, at one open file per unfinished shard.
///
/// ```
/// use moe_checkpoint::{Dtype, ShardedWriter, TensorSpec, WriterOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let out = dir.path();
/// let specs = vec![TensorSpec { name: "a".into(), dtype: Dtype::U8, shape: vec![4] }];
/// let mut writer = ShardedWriter::new(out, WriterOptions::default(), specs)?;
/// writer.append("a", &[1, 2])?;
/// writer.append("a", &[3, 4])?;
/// assert_eq!(writer.finish()?.files, [out.join("model.safetensors")]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ShardedWriter {
    dir: PathBuf,
    specs: Vec<TensorSpec>,
    shards: Vec<ShardLayout>,
    /// Shard, and place in it, of every tensor.
    places: HashMap<String, (usize, Placed)>,
    /// Bytes written of every tensor, by position among the specs.
    written: Vec<u64>,
    finished: Vec<bool>,
    open: BTreeMap<usize, OpenShard>,
}

struct OpenShard {
    file: BufWriter<File>,
    /// Position in the file, to seek only where a tensor is written out of order.
    position: u64,
    /// Tensors that are not complete.
    remaining: usize,
}

impl ShardedWriter {
    /// Lays the tensors out and continues what an earlier writer finished in `dir`, which exists.
    ///
    /// # Errors
    /// [`Error::InvalidTensorSpec`], [`Error::ResumeMismatch`] if `dir` holds the unfinished output of another layout
    /// or recipe, [`Error::Io`].
    pub fn new(dir: impl AsRef<Path>, options: WriterOptions, specs: Vec<TensorSpec>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        let shards = shard_layout::lay_out(&specs, options.max_shard_bytes)?;
        let resumed = check_resume(&dir, &digest(&shards, &options.recipe))?;
        let mut places = HashMap::with_capacity(specs.len());
        for (number, shard) in shards.iter().enumerate() {
            for tensor in &shard.tensors {
                places.insert(specs[tensor.spec].name.clone(), (number, *tensor));
            }
        }
        let finished: Vec<bool> = shards.iter().map(|s| resumed && s.is_complete(&dir.join(&s.file))).collect();
        let written = vec![0; specs.len()];
        let mut writer = Self { dir, specs, shards, places, written, finished, open: BTreeMap::new() };
        for number in 0..writer.shards.len() {
            if writer.finished[number] {
                for tensor in &writer.shards[number].tensors {
                    writer.written[tensor.spec] = tensor.bytes;
                }
            } else if writer.shards[number].tensors.iter().all(|tensor| tensor.bytes == 0) {
                // No append may ever come for it.
                writer.open_shard(number)?;
                writer.close_if_complete(number)?;
            }
        }
        Ok(writer)
    }

    /// The tensors, in the order given.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// Bytes of files that are still to be written.
    pub fn remaining_bytes(&self) -> u64 {
        let files = self.shards.iter().zip(&self.finished).filter(|(_, finished)| !**finished);
        files.map(|(shard, _)| shard.file_bytes).sum()
    }

    /// Whether a tensor is in a finished shard, of this run or an earlier one. Writing it again does nothing, so asking
    /// first only saves making its bytes.
    ///
    /// # Errors
    /// [`Error::InvalidTensorSpec`] for a tensor that is not among the specs.
    pub fn is_finished(&self, name: &str) -> Result<bool> {
        self.place(name).map(|(shard, _)| self.finished[shard])
    }

    /// Writes the next bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::InvalidTensorSpec`] for a tensor that is not among the specs, [`Error::WrittenLength`] past its end,
    /// [`Error::Io`].
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (number, place) = self.place(name)?;
        if self.finished[number] {
            return Ok(());
        }
        let before = self.written[place.spec];
        let after = before.saturating_add(bytes.len() as u64);
        if after > place.bytes {
            return Err(Error::WrittenLength { tensor: name.to_string(), found: after, expected: place.bytes });
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.open_shard(number)?;
        let path = self.temporary(number);
        let Some(shard) = self.open.get_mut(&number) else { return Ok(()) };
        let target = place.begin + before;
        let mut write = || -> std::io::Result<()> {
            if shard.position != target {
                shard.file.seek(SeekFrom::Start(target))?;
            }
            shard.file.write_all(bytes)
        };
        write().map_err(|source| Error::io(&path, source))?;
        shard.position = target + bytes.len() as u64;
        self.written[place.spec] = after;
        if after == place.bytes {
            shard.remaining -= 1;
            self.close_if_complete(number)?;
        }
        Ok(())
    }

    /// Writes a whole tensor.
    ///
    /// # Errors
    /// Those of [`ShardedWriter::append`], and [`Error::WrittenLength`] if the bytes are not exactly those of the
    /// tensor.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (_, place) = self.place(name)?;
        if bytes.len() as u64 != place.bytes {
            let (found, expected) = (bytes.len() as u64, place.bytes);
            return Err(Error::WrittenLength { tensor: name.to_string(), found, expected });
        }
        self.append(name, bytes)
    }

    /// Copies a tensor of the same name from a checkpoint, byte for byte, in small slices.
    ///
    /// # Errors
    /// Those of [`ShardedWriter::append`], [`Error::NoSuchTensor`], and [`Error::InvalidTensorSpec`] if dtype or shape
    /// are not those of the spec.
    pub fn copy(&mut self, from: &Checkpoint, name: &str) -> Result<()> {
        let (number, place) = self.place(name)?;
        let (info, spec) = (from.info(name)?, &self.specs[place.spec]);
        let dtype = from.plain_dtype(name)?;
        if (dtype, &info.shape) != (spec.dtype, &spec.shape) {
            let reason = format!(
                "the copy would be {:?} {:?}, the plan says {:?} {:?}",
                dtype, info.shape, spec.dtype, spec.shape
            );
            return Err(Error::InvalidTensorSpec { tensor: name.to_string(), reason });
        }
        if self.finished[number] {
            return Ok(());
        }
        from.stream_plain(name, COPY_BYTES, |bytes| self.append(name, bytes))
    }

    /// Checks that every tensor is complete, and writes the index if there are several shards.
    ///
    /// # Errors
    /// [`Error::WrittenLength`] naming the first tensor that is not complete, [`Error::Io`].
    pub fn finish(self) -> Result<Written> {
        for (number, shard) in self.shards.iter().enumerate() {
            for tensor in &shard.tensors {
                let found = self.written[tensor.spec];
                if !self.finished[number] && found != tensor.bytes {
                    let (tensor, expected) = (self.specs[tensor.spec].name.clone(), tensor.bytes);
                    return Err(Error::WrittenLength { tensor, found, expected });
                }
            }
        }
        if self.shards.len() > 1 {
            let index = shard_layout::index(&self.specs, &self.shards);
            write_json(&self.dir.join(INDEX_FILE), &index)?;
        }
        let (bytes, parameters) = shard_layout::totals(&self.specs, &self.shards);
        Ok(Written { files: self.shards.iter().map(|s| self.dir.join(&s.file)).collect(), bytes, parameters })
    }

    fn place(&self, name: &str) -> Result<(usize, Placed)> {
        self.places.get(name).copied().ok_or_else(|| Error::InvalidTensorSpec {
            tensor: name.to_string(),
            reason: "it is not among the tensors of the plan".to_string(),
        })
    }

    fn temporary(&self, number: usize) -> PathBuf {
        self.dir.join(format!("{}{TEMPORARY_SUFFIX}", self.shards[number].file))
    }

    fn open_shard(&mut self, number: usize) -> Result<()> {
        if self.open.contains_key(&number) {
            return Ok(());
        }
        let path = self.temporary(number);
        let shard = &self.shards[number];
        let start = || -> std::io::Result<BufWriter<File>> {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
            file.write_all(&shard.header)?;
            Ok(file)
        };
        let file = start().map_err(|source| Error::io(&path, source))?;
        let remaining = shard.tensors.iter().filter(|tensor| tensor.bytes > 0).count();
        self.open.insert(number, OpenShard { file, position: shard.header.len() as u64, remaining });
        Ok(())
    }

    /// Syncs and names a shard whose tensors are all complete.
    fn close_if_complete(&mut self, number: usize) -> Result<()> {
        if self.open.get(&number).is_none_or(|shard| shard.remaining > 0) {
            return Ok(());
        }
        let Some(shard) = self.open.remove(&number) else { return Ok(()) };
        let (temporary, path) = (self.temporary(number), self.dir.join(&self.shards[number].file));
        let close = || -> std::io::Result<()> {
            let file = shard.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            sync_dir(&self.dir);
            Ok(())
        };
        close().map_err(|source| Error::io(&temporary, source))?;
        self.finished[number] = true;
        Ok(())
    }
}

/// Writes a JSON file as transformers does: two spaces, keys in order, a final newline.
///
/// # Errors
/// [`Error::Io`]; the file is untouched then.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    write_atomic(path, format!("{value:#}\n").as_bytes())
}

/// Makes renames in a directory durable, where the file system can.
pub(crate) fn sync_dir(dir: &Path) {
    let _ = File::open(dir).and_then(|dir| dir.sync_all());
}

fn digest(shards: &[ShardLayout], recipe: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    let parts = shards.iter().flat_map(|shard| [shard.file.as_bytes(), &shard.header]);
    for part in parts.chain([recipe.as_bytes()]) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex().to_string()
}

/// Whether `dir` holds an unfinished output of this digest. Writes the record if there is none.
fn check_resume(dir: &Path, digest: &str) -> Result<bool> {
    let path = dir.join(RESUME_FILE);
    if !path.exists() {
        write_json(&path, &serde_json::json!({"version": 1, "digest": digest}))?;
        return Ok(false);
    }
    let record = read_json(&path)?;
    let file = path.display().to_string();
    let fields = Fields::new(&record, &file)?;
    let found = fields.string("digest")?.ok_or_else(|| fields.missing("digest", "the digest of a plan"))?.to_string();
    if found != digest {
        return Err(Error::ResumeMismatch { path, found, expected: digest.to_string() });
    }
    Ok(true)
}
