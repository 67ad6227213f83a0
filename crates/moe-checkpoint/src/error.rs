//! What can go wrong with files of this crate.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with files of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model shape that makes no sense or is not the expected one.
    #[error("{field}: found {found}, expected {expected}")]
    InvalidShape {
        /// What was looked at.
        field: String,
        /// What it was.
        found: String,
        /// What it should have been.
        expected: String,
    },
    /// A statistics, score or plan file that cannot be read as one.
    #[error("{}: not a valid {kind} file: {reason}", path.display())]
    MalformedArtefact {
        /// The file.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file written by a newer version of this crate.
    #[error("{}: {kind} file of version {found}, this crate reads versions 1 to {supported}", path.display())]
    ArtefactVersion {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// Its version.
        found: u64,
        /// The newest version that is read.
        supported: u64,
    },
    /// Statistics or scores of another model, data set or recipe.
    #[error("{what}: {field} is `{found}`, expected `{expected}`")]
    ProvenanceMismatch {
        /// What carries the provenance.
        what: String,
        /// The field that differs.
        field: &'static str,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The same wave twice.
    #[error("{what}: waves {waves:?} are already there; folding them again would count their data twice")]
    WaveOverlap {
        /// What brings the waves.
        what: String,
        /// Their ids.
        waves: Vec<u64>,
    },
    /// Statistics with other arrays than those they are folded with.
    #[error("the statistics hold {found}, expected {expected}")]
    StatisticsDiffer {
        /// Arrays found.
        found: String,
        /// Arrays expected.
        expected: String,
    },
    /// No array of this name.
    #[error("no statistic `{id}`; there are {known:?}")]
    UnknownStatistic {
        /// The name asked for.
        id: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// An array asked for with another granularity or fold than it has.
    #[error("statistic `{id}` was asked for as {found}, but is {expected}")]
    StatisticKind {
        /// The name.
        id: String,
        /// What was asked for.
        found: String,
        /// What it is.
        expected: String,
    },
    /// Not an MoE layer of the model.
    #[error("layer {layer} is not one of the MoE layers {known:?}")]
    UnknownLayer {
        /// The decoder layer index asked for.
        layer: usize,
        /// The MoE layers.
        known: Vec<usize>,
    },
    /// No such expert.
    #[error("layer {layer} has no expert {expert}: it has {count}")]
    UnknownExpert {
        /// Decoder layer index.
        layer: usize,
        /// The expert asked for.
        expert: usize,
        /// How many there are.
        count: usize,
    },
    /// A NaN or an infinity, or a number too large for f32.
    #[error("{what} of layer {layer}, expert {expert}{} is {value}, expected a finite number", unit_suffix(*unit))]
    NonFinite {
        /// What the value is.
        what: String,
        /// Decoder layer index.
        layer: usize,
        /// Expert.
        expert: usize,
        /// Unit, where there is one value per unit.
        unit: Option<usize>,
        /// The value.
        value: f64,
    },
    /// A score table that contradicts itself or the model.
    #[error("invalid score table: {reason}")]
    InvalidScores {
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    pub(crate) fn malformed(path: &Path, kind: &'static str, reason: impl Into<String>) -> Self {
        Error::MalformedArtefact { path: path.to_path_buf(), kind, reason: reason.into() }
    }
}

fn unit_suffix(unit: Option<usize>) -> String {
    unit.map(|unit| format!(", unit {unit}")).unwrap_or_default()
}
