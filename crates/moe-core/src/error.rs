//! What can go wrong while a model is loaded, run or evaluated.

use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can fail in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] moe_checkpoint::Error),
    /// A data set, tokenizer or evaluation file could not be used.
    #[error(transparent)]
    Data(#[from] moe_data::Error),
    /// The device name is unknown, or its backend is not compiled in.
    #[error("device `{name}`: {reason}; compiled in: {available}")]
    Device {
        /// What was asked for.
        name: String,
        /// Why it cannot be had.
        reason: String,
        /// Comma-separated device names that this build accepts.
        available: String,
    },
    /// The memory limit cannot hold what must be in memory at once.
    #[error("max_memory of {limit} bytes is too small: {what} needs at least {needed} bytes")]
    Memory {
        /// The limit asked for, in bytes.
        limit: u64,
        /// The least that would do, in bytes.
        needed: u64,
        /// Which part of the job sets that minimum.
        what: String,
    },
    /// An input (wave, prompt, option) does not fit the model.
    #[error("{field}: found {found}, expected {expected}")]
    Input {
        /// Name of the argument or field.
        field: String,
        /// What was given.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The model does something this crate has no implementation for.
    #[error("{0} is not implemented in moe-core")]
    Unsupported(String),
    /// A number that must be finite is not: a diverged or corrupt model.
    #[error("{what} of wave {wave} is not finite")]
    NotFinite {
        /// Which quantity.
        what: String,
        /// The wave it was computed on.
        wave: u64,
    },
    /// Training came to a loss, gradient or value that it cannot go on from. The parameters are the best so far, if any
    /// were evaluated.
    #[error("training diverged at step {step}: {what}; {}", last_state(state))]
    Diverged {
        /// The step, which was not taken.
        step: usize,
        /// What was seen.
        what: String,
        /// The last saved state.
        state: Option<PathBuf>,
    },
    /// Training that changes nothing: no parameter has had a gradient.
    #[error(
        "no gradient reached any of {parameters} in the first {steps} steps, so nothing is learnt: what is trained takes no part in what \
         the rows predict, or a weight of zero stands before it"
    )]
    NoGradient {
        /// Steps that were run.
        steps: usize,
        /// What was to be trained.
        parameters: String,
    },
    /// A saved state of training that does not fit, or is not one.
    #[error("{}: {field}: found {found}, expected {expected}", path.display())]
    State {
        /// The file or directory.
        path: PathBuf,
        /// What differs.
        field: String,
        /// What the state has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The spill file could not be written or read back.
    #[error("spill file in {dir}: {source}")]
    Spill {
        /// Directory of the spill file.
        dir: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// An observer refused what it saw.
    #[error("observer: {0}")]
    Observer(Box<dyn std::error::Error + Send + Sync>),
    /// An overlay could not change an expert.
    #[error("overlay: {0}")]
    Overlay(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps the error of an [`Observer`](crate::trace::Observer).
    pub fn observer(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Observer(error.into())
    }

    /// Wraps the error of an [`ExpertOverlay`](crate::ExpertOverlay).
    pub fn overlay(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Overlay(error.into())
    }

    /// An error about a file, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// An error about a saved state.
    pub(crate) fn state(path: &Path, field: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        let (found, expected) = (found.to_string(), expected.to_string());
        Self::State { path: path.to_path_buf(), field: field.into(), found, expected }
    }

    pub(crate) fn input(field: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Self::Input { field: field.into(), found: found.to_string(), expected: expected.to_string() }
    }
}

fn last_state(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or("no state was saved".into(), |path| format!("the last saved state is {}", path.display()))
}
