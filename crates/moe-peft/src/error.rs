//! Errors.

use std::path::PathBuf;

/// What can go wrong. Every message names the file, tensor or field, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint or a tensor file.
    #[error(transparent)]
    Checkpoint(#[from] moe_checkpoint::Error),
    /// The model, the engine or the training loop.
    #[error(transparent)]
    Core(#[from] moe_core::Error),
    /// A calibration, or the scores from it.
    #[error(transparent)]
    Importance(#[from] moe_importance::Error),
    /// A value out of its range, or one that does not fit another.
    #[error("{what}: found {found}, expected {expected}")]
    Input {
        /// The field, argument, tensor or layer.
        what: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A file whose contents are not what they have to be.
    #[error("{}: {what}: found {found}, expected {expected}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The field or tensor.
        what: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something that is not implemented, or cannot be.
    #[error("not supported: {0}")]
    Unsupported(String),
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A value that is not what it has to be.
    pub(crate) fn input(what: impl ToString, found: impl ToString, expected: impl ToString) -> Self {
        Self::Input { what: what.to_string(), found: found.to_string(), expected: expected.to_string() }
    }

    /// As an error of reading a model that a method makes.
    pub(crate) fn reading(self) -> moe_checkpoint::Error {
        match self {
            Self::Checkpoint(error) => error,
            other => moe_checkpoint::Error::method(other),
        }
    }
}
