//! A safetensors file of f32 tensors that are written piece by piece, in any order.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use crate::{Error, Result};

/// The file being written, `.NAME.partial` until it is finished. What is never written is zero, and takes no space
/// where the file system knows holes.
#[derive(Debug)]
pub struct TensorOutput {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    /// Start in the file and number of elements of each tensor.
    places: BTreeMap<String, (u64, usize)>,
}

impl TensorOutput {
    /// Lays out tensors of these names and shapes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, tensors: &[(String, Vec<usize>)]) -> Result<Self> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut places = BTreeMap::new();
        let mut end = 0u64;
        for (name, shape) in tensors {
            let elements = shape.iter().product::<usize>();
            let start = end;
            end += 4 * elements as u64;
            header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
            places.insert(name.clone(), (start, elements));
        }
        let mut header = serde_json::to_vec(&header).map_err(|error| Error::Invalid(error.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let data = 8 + header.len() as u64;
        places.values_mut().for_each(|(start, _)| *start += data);

        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let partial = path.with_file_name(format!(".{name}.partial"));
        let write = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&partial)?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            file.set_len(data + end)?;
            Ok(file)
        };
        let file = write().map_err(Error::io(&partial))?;
        Ok(Self { path: path.to_path_buf(), partial, file, places })
    }

    /// Writes consecutive values of a tensor, beginning at element `first`.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the tensor was not laid out, or has fewer elements.
    pub fn write(&mut self, name: &str, first: usize, values: &[f32]) -> Result<()> {
        let start = self.start(name, first, values.len());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.file
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.file.write_all(&bytes))
            .map_err(Error::io(&self.partial))
    }

    /// Adds to consecutive values of a tensor.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// As [`TensorOutput::write`].
    pub fn add(&mut self, name: &str, first: usize, values: &[f32]) -> Result<()> {
        let start = self.start(name, first, values.len());
        let mut bytes = vec![0; 4 * values.len()];
        self.file
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(Error::io(&self.partial))?;
        let before = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        let sums: Vec<f32> = before.zip(values).map(|(a, b)| a + b).collect();
        self.write(name, first, &sums)
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(Error::io(&self.path))
    }

    fn start(&self, name: &str, first: usize, count: usize) -> u64 {
        let (start, elements) = self.places[name];
        assert!(first + count <= elements, "{name}: {count} values from {first}, but it has {elements}");
        start + 4 * first as u64
    }
}
