//! What can go wrong between experts and a merged checkpoint.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between experts and a merged checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint, a file of it, a protection mask, or routing by groups that a plan would break.
    #[error(transparent)]
    Checkpoint(Box<moe_checkpoint::Error>),
    /// The engine.
    #[cfg(feature = "engine")]
    #[error(transparent)]
    Engine(Box<moe_core::Error>),
    /// Collecting statistics, or scoring by them.
    #[error(transparent)]
    Statistics(Box<moe_importance::Error>),
    /// A parameter outside its range.
    #[error("{field} is {found}, expected {expected}")]
    InvalidParameter {
        /// The parameter.
        field: &'static str,
        /// Its value.
        found: String,
        /// The values it may have.
        expected: String,
    },
    /// Something that a part of the recipe must be told and was not.
    #[error("layer {layer}: {part} needs {what}, which the evidence does not hold")]
    MissingEvidence {
        /// Decoder layer index.
        layer: usize,
        /// The part of the recipe.
        part: &'static str,
        /// What is missing.
        what: String,
    },
    /// Evidence that does not fit the model, or a file that is none.
    #[error("{}invalid evidence: {reason}", path_prefix(.path))]
    InvalidEvidence {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// What is wrong with it.
        reason: String,
    },
    /// A budget that cannot be met together with protected experts, capacities and one group per layer.
    #[error("infeasible: {what}: {reason}")]
    Infeasible {
        /// The model or a layer.
        what: String,
        /// Reason, in words.
        reason: String,
    },
    /// Experts that cannot be combined.
    #[error("layer {layer}, experts {experts:?}: {reason}")]
    Incompatible {
        /// Decoder layer index.
        layer: usize,
        /// The experts.
        experts: Vec<usize>,
        /// Reason, in words.
        reason: String,
    },
    /// Numerics without a result: a decomposition that does not converge, a value that is not finite.
    #[error("{what}: {reason}")]
    Numerics {
        /// What was computed.
        what: String,
        /// Why it failed.
        reason: String,
    },
    /// A plan that contradicts itself, or a file that is not a plan.
    #[error("{}invalid merge plan: {reason}", path_prefix(.path))]
    InvalidPlan {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of a newer version of this crate.
    #[error("{}{what} of version {found}, this crate reads versions 1 to {supported}", path_prefix(.path))]
    Version {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// What kind of file.
        what: &'static str,
        /// Its version.
        found: u64,
        /// The newest version that is read.
        supported: u64,
    },
    /// A plan or evidence of one checkpoint and another checkpoint.
    #[error("the {what} was made for the model with fingerprint {expected}, but {} has fingerprint {found}", path.display())]
    OtherModel {
        /// The plan, the evidence.
        what: &'static str,
        /// The checkpoint.
        path: PathBuf,
        /// The fingerprint of the checkpoint.
        found: String,
        /// The fingerprint it was made for.
        expected: String,
    },
    /// An output form that the plan does not allow.
    #[error("cannot write {form}: {reason}")]
    Output {
        /// The output form.
        form: &'static str,
        /// Reason, in words.
        reason: String,
    },
    /// The operating system refused an operation on a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The progress callback stopped the work; what is written so far can be resumed.
    #[error("interrupted: {0}")]
    Interrupted(Box<dyn std::error::Error + Send + Sync>),
}

impl From<moe_checkpoint::Error> for Error {
    fn from(error: moe_checkpoint::Error) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}

impl From<moe_importance::Error> for Error {
    fn from(error: moe_importance::Error) -> Self {
        Self::Statistics(Box::new(error))
    }
}

#[cfg(feature = "engine")]
impl From<moe_core::Error> for Error {
    fn from(error: moe_core::Error) -> Self {
        Self::Engine(Box::new(error))
    }
}

impl Error {
    pub(crate) fn invalid_plan(reason: impl Into<String>) -> Self {
        Self::InvalidPlan { path: None, reason: reason.into() }
    }

    pub(crate) fn invalid_evidence(reason: impl Into<String>) -> Self {
        Self::InvalidEvidence { path: None, reason: reason.into() }
    }

    pub(crate) fn numerics(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Numerics { what: what.into(), reason: reason.to_string() }
    }

    pub(crate) fn infeasible(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Infeasible { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn parameter(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self::InvalidParameter { field, found: found.to_string(), expected: expected.into() }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// The same error, saying which file it is about.
    pub(crate) fn in_file(self, file: &Path) -> Self {
        match self {
            Self::InvalidPlan { reason, .. } => Self::InvalidPlan { path: Some(file.into()), reason },
            Self::InvalidEvidence { reason, .. } => Self::InvalidEvidence { path: Some(file.into()), reason },
            Self::Version { what, found, supported, .. } => {
                Self::Version { path: Some(file.into()), what, found, supported }
            }
            other => other,
        }
    }
}

fn path_prefix(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default()
}
