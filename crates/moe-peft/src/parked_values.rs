//! Values of weights that wait for their next turn in training.

use std::{
    fmt,
    fs::{self, File},
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use moe_checkpoint::{Checkpoint, Role};
use moe_core::{adapters::Site, train::StoredValues};

use crate::{Error, Result, trainable_tensors};

/// A linear map of a checkpoint, or a tensor of it, as values that were not trained yet.
pub(crate) enum OfCheckpoint {
    Map(Arc<Checkpoint>, Site),
    Vector(Arc<Checkpoint>, Role),
    Rows(Arc<Checkpoint>, Role, std::ops::Range<usize>),
}

impl fmt::Debug for OfCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(_, site) => write!(f, "{site}"),
            Self::Vector(_, role) => write!(f, "{role}"),
            Self::Rows(_, role, rows) => write!(f, "rows {rows:?} of {role}"),
        }
    }
}

impl StoredValues for OfCheckpoint {
    fn read(&self) -> moe_core::Result<Vec<f32>> {
        match self {
            Self::Map(checkpoint, site) => trainable_tensors::read(checkpoint, *site).map_err(into_core),
            Self::Vector(checkpoint, role) => Ok(checkpoint.read_f32(*role)?),
            Self::Rows(checkpoint, role, rows) => Ok(checkpoint.read_f32_rows(*role, rows.clone())?),
        }
    }
}

fn into_core(error: Error) -> moe_core::Error {
    match error {
        Error::Core(error) => error,
        Error::Checkpoint(error) => error.into(),
        other => moe_core::Error::observer(other),
    }
}

/// Where values are parked: in files without names, which go with the values, and with the process however it ends.
#[derive(Debug)]
pub(crate) struct Parking {
    directory: PathBuf,
}

impl Parking {
    /// In `directory`, if there is one, or in the system's directory for temporary files.
    pub fn new(directory: Option<&Path>) -> Arc<Self> {
        Arc::new(Self { directory: directory.map_or_else(std::env::temp_dir, Path::to_path_buf) })
    }

    /// Writes values to a file of their own: exactly, as f32.
    pub fn park(&self, values: &[f32]) -> Result<Arc<dyn StoredValues>> {
        let io = |source| Error::Io { path: self.directory.clone(), source };
        fs::create_dir_all(&self.directory).map_err(io)?;
        let mut file = BufWriter::new(tempfile::tempfile_in(&self.directory).map_err(io)?);
        for value in values {
            file.write_all(&value.to_le_bytes()).map_err(io)?;
        }
        let file = file.into_inner().map_err(|error| io(error.into_error()))?;
        Ok(Arc::new(Parked { directory: self.directory.clone(), file: Mutex::new(file), len: values.len() }))
    }
}

/// Values in a file, which goes with them.
#[derive(Debug)]
struct Parked {
    /// For messages.
    directory: PathBuf,
    file: Mutex<File>,
    len: usize,
}

impl StoredValues for Parked {
    fn read(&self) -> moe_core::Result<Vec<f32>> {
        let io = |source| moe_core::Error::Io { path: self.directory.clone(), source };
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        let mut file = BufReader::with_capacity(1 << 16, &mut *file);
        let mut values = Vec::with_capacity(self.len);
        let mut bytes = [0; 4];
        for _ in 0..self.len {
            file.read_exact(&mut bytes).map_err(io)?;
            values.push(f32::from_le_bytes(bytes));
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parked_values_come_back_to_the_bit_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let parking = Parking::new(Some(dir.path()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let values: Vec<f32> = (0..100_000).map(|i| (i as f32).sin() * 1e-3).chain([-0.0, f32::MIN_POSITIVE]).collect();
        let (first, second) = (parking.park(&values).unwrap(), parking.park(&[1.0]).unwrap());
        let same = first.read().unwrap().iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && second.read().unwrap() == [1.0]);
        drop((first, parking));
        assert_eq!(second.read().unwrap(), [1.0]);
        drop(second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
