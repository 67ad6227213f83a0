//! Values of weights that wait for their next turn in training.

use std::{
    fmt,
    fs::{self, File},
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
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

/// A directory of parked values, which goes with the last of them. It is made when the first values come.
#[derive(Debug)]
pub(crate) struct Parking {
    directory: PathBuf,
    count: AtomicU64,
}

/// Numbers the directories of this process.
static PARKINGS: AtomicU64 = AtomicU64::new(0);

impl Parking {
    /// In `directory`, if there is one, or in the system's directory for temporary files.
    pub fn new(directory: Option<&Path>) -> Arc<Self> {
        let number = PARKINGS.fetch_add(1, Ordering::Relaxed);
        let name = format!("parked-{}-{number}", std::process::id());
        let directory = match directory {
            Some(directory) => directory.join(name),
            None => std::env::temp_dir().join(format!("moe-{name}")),
        };
        Arc::new(Self { directory, count: AtomicU64::new(0) })
    }

    /// Writes values to a file of their own: exactly, as f32.
    pub fn park(self: &Arc<Self>, values: &[f32]) -> Result<Arc<dyn StoredValues>> {
        let path = self.directory.join(format!("{}.f32", self.count.fetch_add(1, Ordering::Relaxed)));
        let io = |source| Error::Io { path: path.clone(), source };
        fs::create_dir_all(&self.directory).map_err(io)?;
        let mut file = BufWriter::new(File::create(&path).map_err(io)?);
        for value in values {
            file.write_all(&value.to_le_bytes()).map_err(io)?;
        }
        file.flush().map_err(io)?;
        Ok(Arc::new(Parked { path, len: values.len(), _parking: self.clone() }))
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        // What cannot be removed is a file too many and no wrong result.
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Values in a file, which goes with them.
#[derive(Debug)]
struct Parked {
    path: PathBuf,
    len: usize,
    _parking: Arc<Parking>,
}

impl StoredValues for Parked {
    fn read(&self) -> moe_core::Result<Vec<f32>> {
        let io = |source| moe_core::Error::Io { path: self.path.clone(), source };
        let mut file = BufReader::with_capacity(1 << 16, File::open(&self.path).map_err(io)?);
        let mut values = Vec::with_capacity(self.len);
        let mut bytes = [0; 4];
        for _ in 0..self.len {
            file.read_exact(&mut bytes).map_err(io)?;
            values.push(f32::from_le_bytes(bytes));
        }
        Ok(values)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
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
