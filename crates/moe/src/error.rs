//! What stops a program.

use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What stops a program; shown as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Options that do not go together, or a value outside its range: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// An input or output that cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// Another process of the group failed, and says so itself: nothing more is to be said.
    #[error("another process failed")]
    Elsewhere,
    /// The operating system refused an operation on a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint, statistics or score file.
    #[error(transparent)]
    Checkpoint(#[from] moe_checkpoint::Error),
    /// A tokenizer, data set or evaluation file.
    #[error(transparent)]
    Data(#[from] moe_core::data::Error),
    /// Running a model.
    #[error(transparent)]
    Run(#[from] moe_core::Error),
    /// Collecting statistics or scoring.
    #[error(transparent)]
    Importance(#[from] moe_importance::Error),
    /// Merging experts.
    #[error(transparent)]
    Merge(#[from] moe_merge::Error),
    /// Fine-tuning.
    #[error(transparent)]
    Peft(Box<moe_peft::Error>),
    /// Planning or applying.
    #[error(transparent)]
    Prune(#[from] moe_prune::Error),
}

impl From<moe_peft::Error> for Error {
    fn from(error: moe_peft::Error) -> Self {
        Self::Peft(Box::new(error))
    }
}

impl Error {
    /// Wraps an I/O error with the path it is about.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// Exit code of a program that it stops: 2 for usage, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            _ => 1,
        }
    }
}
