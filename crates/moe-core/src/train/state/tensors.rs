//! Files of tensors that are written and read one tensor at a time, so that memory holds nothing twice.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use crate::error::{Error, Result};

/// Suffix of a file that is being written.
pub(super) const TEMPORARY: &str = ".tmp";

/// Values of a tensor to write.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// Writes a safetensors file under another name, syncs it, and gives it its name.
pub(super) fn write(path: &Path, tensors: &[(String, Vec<usize>, Values<'_>)]) -> Result<u64> {
    let temporary = path.with_added_extension(&TEMPORARY[1..]);
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, values) in tensors {
        let (dtype, bytes): (_, &[u8]) = match values {
            Values::F32(values) => (Dtype::F32, bytemuck::cast_slice(values)),
            Values::F64(values) => (Dtype::F64, bytemuck::cast_slice(values)),
        };
        let view = TensorView::new(dtype, shape.clone(), bytes)
            .map_err(|error| Error::state(path, name, error, format!("values of shape {shape:?}")))?;
        views.push((name, view));
    }
    safetensors::serialize_to_file(views, None, &temporary)
        .map_err(|error| Error::io(&temporary)(std::io::Error::other(error)))?;
    let sync = || -> std::io::Result<u64> {
        let file = File::open(&temporary)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        fs::rename(&temporary, path)?;
        // Not every file system lets a directory be synced.
        path.parent().map(|parent| File::open(parent).and_then(|directory| directory.sync_all()));
        Ok(bytes)
    };
    sync().map_err(Error::io(path))
}

/// A file of tensors to read from.
pub(super) struct Reader {
    path: PathBuf,
    file: File,
    start: u64,
    tensors: HashMap<String, (String, Vec<usize>, u64, u64)>,
}

impl Reader {
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut prefix = [0; 8];
        let malformed = |found: &str| Error::state(path, "header", found, "that of a safetensors file");
        file.read_exact(&mut prefix).map_err(|_| malformed("the end of the file"))?;
        let header_length = u64::from_le_bytes(prefix);
        let start = header_length.checked_add(8).filter(|start| *start <= length);
        let start = start.ok_or_else(|| malformed("the end of the file"))?;
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(Error::io(path))?;
        let header: HashMap<String, Value> = serde_json::from_slice(&header).map_err(|e| malformed(&e.to_string()))?;
        let mut tensors = HashMap::new();
        for (name, info) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let dtype = info["dtype"].as_str().unwrap_or_default().to_string();
            let numbers = |key: &str| -> Option<Vec<u64>> { info[key].as_array()?.iter().map(Value::as_u64).collect() };
            let (shape, offsets) = (numbers("shape"), numbers("data_offsets"));
            let (Some(shape), Some(&[begin, end])) = (shape, offsets.as_deref()) else {
                return Err(Error::state(path, name, info, "shape and data_offsets"));
            };
            if begin > end || end > length - start {
                return Err(Error::state(path, name, format!("{} bytes of data", length - start), format!("{end}")));
            }
            tensors.insert(name, (dtype, shape.into_iter().map(|n| n as usize).collect(), begin, end));
        }
        Ok(Self { path: path.to_path_buf(), file, start, tensors })
    }

    pub fn names(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors.iter().map(|(name, (_, shape, ..))| (name.clone(), shape.clone())).collect()
    }

    pub fn f32(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.read("F32", name, shape)
    }

    pub fn f64(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        self.read("F64", name, shape)
    }

    fn read<T: Pod + Zeroable>(&mut self, dtype: &str, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let expected = || format!("{dtype} {shape:?}");
        let Some((found, found_shape, begin, end)) = self.tensors.get(name) else {
            return Err(Error::state(&self.path, name, "nothing", expected()));
        };
        let length = shape.iter().product::<usize>();
        let fits = found == dtype && found_shape == shape && end - begin == (length * size_of::<T>()) as u64;
        if !fits {
            let found = format!("{found} {found_shape:?} of {} bytes", end - begin);
            return Err(Error::state(&self.path, name, found, expected()));
        }
        let mut values = vec![T::zeroed(); length];
        self.file.seek(SeekFrom::Start(self.start + begin)).map_err(Error::io(&self.path))?;
        self.file.read_exact(bytemuck::cast_slice_mut(&mut values)).map_err(Error::io(&self.path))?;
        Ok(values)
    }
}
