//! The delta file: see `docs/delta-format.md`.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Take, Write};
use std::path::{Path, PathBuf};

use moe_checkpoint::{Dtype, TensorSpec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::source::{Opened, elements};
use crate::{Error, Result};

/// First bytes of a delta file.
const MAGIC: &[u8; 8] = b"MOEDELTA";
/// Version of the format.
const VERSION: u32 = 1;
/// Bytes before the payload.
const PREFIX: u64 = 32;
/// Longest table that is read.
const MAX_TABLE: u64 = 1 << 30;

/// What a delta is added to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "base", rename_all = "snake_case")]
pub enum DeltaBase {
    /// A checkpoint.
    Checkpoint {
        /// Its [`fingerprint`](moe_checkpoint::Checkpoint::fingerprint).
        fingerprint: String,
    },
    /// Nothing: the delta is an adapter, whose elements start from a constant.
    Adapter {
        /// The constant.
        start: f32,
        /// `adapter_config.json`.
        config: Value,
    },
}

/// How the payload is coded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "coding", rename_all = "snake_case")]
pub enum DeltaCoding {
    /// Signs at some positions of the concatenated tensors, times one number.
    Ternary {
        /// Number of elements that are kept.
        kept: u64,
        /// Rice parameter of the gaps.
        rice: u32,
        /// The number, as bits of an f32.
        scale: u32,
    },
    /// Values at some positions of the concatenated tensors.
    Sparse {
        /// Number of elements that are kept.
        kept: u64,
        /// Rice parameter of the gaps.
        rice: u32,
        /// Dtype of the values: F32, F16 or BF16.
        dtype: Dtype,
    },
    /// The tensors that changed, as they are now, byte for byte.
    Changed,
    /// Differences of the tensors that changed.
    Difference {
        /// Their dtype: F32, F16 or BF16.
        dtype: Dtype,
    },
}

/// A tensor of a delta, as it is on the fine-tuned side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeltaTensor {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl DeltaTensor {
    pub(super) fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }
}

/// The table of a delta file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeltaTable {
    /// What it is added to.
    #[serde(flatten)]
    pub base: DeltaBase,
    /// How the payload is coded.
    #[serde(flatten)]
    pub coding: DeltaCoding,
    /// Tensors in the order of the payload, which is that of their names.
    pub tensors: Vec<DeltaTensor>,
    /// Bytes of the payload.
    pub payload_bytes: u64,
    /// BLAKE3 of the payload.
    pub payload_digest: String,
    /// Version of the crate that wrote it.
    pub crate_version: String,
}

impl DeltaTable {
    /// Elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(|tensor| elements(&tensor.spec())).sum()
    }

    /// Bytes of an element in the payload, for dense codings.
    pub(super) fn dense_bytes(&self, tensor: &DeltaTensor) -> Option<usize> {
        match self.coding {
            DeltaCoding::Changed => Some(tensor.dtype.bitsize() / 8),
            DeltaCoding::Difference { dtype } => Some(dtype.bitsize() / 8),
            _ => None,
        }
    }
}

/// The base of a task vector, for the table.
pub(super) fn base_of(source: &Opened<'_>) -> DeltaBase {
    match source {
        Opened::Checkpoints { base, .. } => DeltaBase::Checkpoint { fingerprint: base.fingerprint() },
        Opened::Adapter { start, config, .. } => DeltaBase::Adapter { start: *start, config: config.clone() },
    }
}

/// Counts and hashes what goes through.
pub(super) struct Hashed<W> {
    out: W,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// A delta file being written beside its name.
pub(super) struct DeltaWriter {
    path: PathBuf,
    temporary: PathBuf,
    pub payload: Hashed<BufWriter<File>>,
}

impl DeltaWriter {
    pub fn create(path: &Path) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let start = || -> std::io::Result<BufWriter<File>> {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
            file.write_all(&[0; PREFIX as usize])?;
            Ok(file)
        };
        let out = start().map_err(io(&temporary))?;
        let payload = Hashed { out, hasher: blake3::Hasher::new(), bytes: 0 };
        Ok(Self { path: path.to_path_buf(), temporary, payload })
    }

    /// Writes the table, fills in the prefix, syncs and names the file; its bytes.
    pub fn finish(self, base: DeltaBase, coding: DeltaCoding, tensors: Vec<DeltaTensor>) -> Result<(DeltaTable, u64)> {
        let Hashed { mut out, hasher, bytes } = self.payload;
        let table = DeltaTable {
            base,
            coding,
            tensors,
            payload_bytes: bytes,
            payload_digest: hasher.finalize().to_hex().to_string(),
            crate_version: env!("CARGO_PKG_VERSION").into(),
        };
        let json = serde_json::to_vec(&table).map_err(|error| Error::Unsupported(format!("this table: {error}")))?;
        let mut prefix = Vec::with_capacity(PREFIX as usize);
        prefix.extend(MAGIC);
        prefix.extend(VERSION.to_le_bytes());
        prefix.extend([0; 4]);
        prefix.extend((PREFIX + bytes).to_le_bytes());
        prefix.extend((json.len() as u64).to_le_bytes());
        let mut finish = || -> std::io::Result<()> {
            out.write_all(&json)?;
            out.seek(SeekFrom::Start(0))?;
            out.write_all(&prefix)?;
            out.flush()?;
            out.get_ref().sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        finish().map_err(io(&self.temporary))?;
        Ok((table, PREFIX + bytes + json.len() as u64))
    }
}

/// A delta file whose table has been read and whose payload has been checked.
#[derive(Clone, Debug)]
pub struct Delta {
    path: PathBuf,
    table: DeltaTable,
    bytes: u64,
}

impl Delta {
    /// Reads the table, and the payload once to check its digest.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`](crate::Error::File) names what is wrong with a file that is cut short, changed,
    /// of another version or no delta.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |what: &str, found: String, expected: String| Error::File {
            path: path.to_path_buf(),
            what: what.into(),
            found,
            expected,
        };
        let mut file = File::open(path).map_err(io(path))?;
        let length = file.metadata().map_err(io(path))?.len();
        let mut prefix = [0; PREFIX as usize];
        file.read_exact(&mut prefix)
            .map_err(|_| wrong("length", format!("{length} bytes"), format!("at least {PREFIX}")))?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| prefix[at + i]));
        if &prefix[..8] != MAGIC {
            return Err(wrong("first bytes", format!("{:?}", &prefix[..8]), format!("{MAGIC:?}")));
        }
        let version = number(8) as u32;
        if version != VERSION {
            return Err(wrong("version", version.to_string(), VERSION.to_string()));
        }
        let (begin, table_bytes) = (number(16), number(24));
        let end = begin.checked_add(table_bytes).filter(|_| begin >= PREFIX && table_bytes <= MAX_TABLE);
        if end != Some(length) {
            let found = format!("{table_bytes} bytes from {begin} on");
            return Err(wrong("place of the table", found, format!("one that ends at {length}")));
        }
        let payload_bytes = begin - PREFIX;
        let mut hasher = blake3::Hasher::new();
        let mut reader = BufReader::new((&mut file).take(payload_bytes));
        std::io::copy(&mut reader, &mut hasher).map_err(io(path))?;
        file.seek(SeekFrom::Start(begin)).map_err(io(path))?;
        let mut json = Vec::new();
        file.read_to_end(&mut json).map_err(io(path))?;
        let table: DeltaTable = serde_json::from_slice(&json)
            .map_err(|error| wrong("table", error.to_string(), "the table of a delta".into()))?;
        let digest = hasher.finalize().to_hex().to_string();
        if (payload_bytes, &digest) != (table.payload_bytes, &table.payload_digest) {
            let expected = format!("{} bytes with digest {}", table.payload_bytes, table.payload_digest);
            return Err(wrong("payload", format!("{payload_bytes} bytes with digest {digest}"), expected));
        }
        let delta = Self { path: path.to_path_buf(), table, bytes: length };
        delta.check_table()?;
        Ok(delta)
    }

    /// Its table.
    pub fn table(&self) -> &DeltaTable {
        &self.table
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The payload from a byte on, through a buffer.
    pub(super) fn payload(&self, byte: u64, buffer: usize) -> Result<BufReader<Take<File>>> {
        let mut file = File::open(&self.path).map_err(io(&self.path))?;
        file.seek(SeekFrom::Start(PREFIX + byte)).map_err(io(&self.path))?;
        Ok(BufReader::with_capacity(buffer, file.take(self.table.payload_bytes.saturating_sub(byte))))
    }

    pub(super) fn wrong(&self, what: &str, found: impl ToString, expected: impl ToString) -> Error {
        let (found, expected) = (found.to_string(), expected.to_string());
        Error::File { path: self.path.clone(), what: what.into(), found, expected }
    }

    /// Checks numbers that work would be planned by.
    fn check_table(&self) -> Result<()> {
        let table = &self.table;
        let float = |dtype: Dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let mut elements: u64 = 0;
        for (index, tensor) in table.tensors.iter().enumerate() {
            let size = tensor.shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size as u64));
            let sum = size.and_then(|size| elements.checked_add(size)).filter(|sum| *sum < 1 << 56);
            elements =
                sum.ok_or_else(|| self.wrong("shape", format!("{:?}", tensor.shape), "one that can be counted"))?;
            if !float(tensor.dtype) {
                return Err(self.wrong(&tensor.name, tensor.dtype.to_string(), "F32, F16 or BF16"));
            }
            if index > 0 && table.tensors[index - 1].name >= tensor.name {
                return Err(self.wrong("order of tensors", &tensor.name, "each once, by name"));
            }
        }
        let (kept, rice, bits) = match table.coding {
            DeltaCoding::Ternary { kept, rice, .. } => (kept, rice, 2),
            DeltaCoding::Sparse { kept, rice, dtype } if float(dtype) => (kept, rice, 1 + dtype.bitsize() as u64),
            DeltaCoding::Changed => (0, 0, 0),
            DeltaCoding::Difference { dtype } if float(dtype) => (0, 0, 0),
            DeltaCoding::Sparse { dtype, .. } | DeltaCoding::Difference { dtype } => {
                return Err(self.wrong("dtype", dtype.to_string(), "F32, F16 or BF16"));
            }
        };
        if kept > elements || rice > 30 || kept.saturating_mul(bits) > table.payload_bytes.saturating_mul(8) {
            let found = format!("{kept} positions with parameter {rice}");
            return Err(self.wrong("coding", found, format!("what {} bytes can hold", table.payload_bytes)));
        }
        let dense: Option<u64> =
            table.tensors.iter().map(|tensor| Some(elements_of(tensor) * table.dense_bytes(tensor)? as u64)).sum();
        match dense.filter(|dense| *dense != table.payload_bytes && !table.tensors.is_empty()) {
            Some(dense) => Err(self.wrong("payload", table.payload_bytes, dense)),
            None => Ok(()),
        }
    }
}

fn elements_of(tensor: &DeltaTensor) -> u64 {
    tensor.shape.iter().map(|size| *size as u64).product()
}

pub(super) fn io(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    |source| Error::Io { path: path.to_path_buf(), source }
}
