//! Values of parameters that are not in memory.

use std::{fmt::Debug, sync::Arc};

use crate::error::{Error, Result};

/// Where the values of a parameter are while it is not trained: a file, or the weights of the model that they are still
/// those of.
pub trait StoredValues: Debug + Send + Sync {
    /// Reads them, row-major: always the same ones.
    ///
    /// # Errors
    /// What keeps them from being read.
    fn read(&self) -> Result<Vec<f32>>;
}

/// Stored values; equal if they are the same storage.
#[derive(Clone, Debug)]
pub(super) struct Stored(pub Arc<dyn StoredValues>);

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Stored {
    /// So many values.
    pub fn read(&self, len: usize) -> Result<Vec<f32>> {
        let values = self.0.read()?;
        match values.len() == len {
            true => Ok(values),
            false => Err(Error::input(format!("values stored as {:?}", self.0), values.len(), len)),
        }
    }
}
