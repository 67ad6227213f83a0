//! What can go wrong between scores and a pruned checkpoint.

use std::path::PathBuf;

use moe_checkpoint::Pool;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between scores and a pruned checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint, statistics or score file.
    #[error(transparent)]
    Checkpoint(Box<moe_checkpoint::Error>),
    /// A model that could not be run.
    #[cfg(feature = "repair")]
    #[error(transparent)]
    Model(Box<moe_core::Error>),
    /// Statistics of a model that could not be collected or read.
    #[cfg(feature = "repair")]
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
    /// A budget that cannot be met together with protected units, the minimum width and the width multiple.
    #[error("infeasible budget: {what} may keep {asked} units, but {reason}")]
    Infeasible {
        /// The model, a layer or an expert.
        what: String,
        /// Units that the budget leaves.
        asked: usize,
        /// What asks for more.
        reason: String,
    },
    /// The width multiple keeps the budget from being met to the unit, and the caller asked for exactness.
    #[error("{asked} units were to be dropped, but widths of a multiple of {round_to} allow {achieved}")]
    Inexact {
        /// Units that the budget drops.
        asked: usize,
        /// Units that would be dropped.
        achieved: usize,
        /// The width multiple.
        round_to: usize,
    },
    /// Scores compared over a wider pool than they support.
    #[error(
        "the scores may be compared within {}, but this selection compares them over {}", pool_name(*.supported), pool_name(*.wanted)
    )]
    PoolTooNarrow {
        /// Pool of the selection.
        wanted: Pool,
        /// Pool of the table.
        supported: Pool,
    },
    /// Scores added up over a wider pool than they support: shares, ranks and ratios do not add up.
    #[error(
        "the scores may {}, but {what} adds them up over {}",
        supported.map_or("not be added".into(), |pool| format!("be added within {}", pool_name(pool))), pool_name(*.wanted)
    )]
    NotAdditive {
        /// What adds them.
        what: &'static str,
        /// Pool over which they are added.
        wanted: Pool,
        /// Pool over which the table says that they may be.
        supported: Option<Pool>,
    },
    /// Scores of units alone, where layers and experts are weighed as wholes.
    #[error(
        "scores of {scorer} without weights of layers and experts as wholes, by which the budget is shared out; scorer `slimming` gives them"
    )]
    NeedsWholes {
        /// Recipe of the scorer.
        scorer: String,
    },
    /// Expert scores where unit scores are needed.
    #[error(
        "the table scores experts, so that all units of an expert tie; combine it with a unit tie-breaker first (ScoreTable::broadcast)"
    )]
    NeedsUnitScores,
    /// Unit scores where expert scores are needed.
    #[error("the table scores units; reduce it to experts first (ScoreTable::to_experts)")]
    NeedsExpertScores,
    /// An allocator or pruner that has to run the model, without one.
    #[error("{what} is only known by running the model: a probe is needed")]
    NeedsProbe {
        /// What was asked.
        what: &'static str,
    },
    /// Distortion curves that do not fit, or a file that does not hold any.
    #[error("{}invalid distortion curves: {reason}", path_prefix(.path))]
    InvalidCurves {
        /// The file, if they came from one.
        path: Option<PathBuf>,
        /// What is wrong with them.
        reason: String,
    },
    /// A plan that contradicts itself, or a file that is not a plan.
    #[error("{}invalid prune plan: {reason}", path_prefix(.path))]
    InvalidPlan {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// What is wrong with it.
        reason: String,
    },
    /// A plan of a newer version of this crate.
    #[error("{}prune plan of version {found}, this crate reads versions 1 to {supported}", path_prefix(.path))]
    PlanVersion {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// Its version.
        found: u64,
        /// The newest version that is read.
        supported: u64,
    },
    /// Edits that do not fit their plan, or a file that holds none.
    #[error("{}invalid edits: {reason}", path_prefix(.path))]
    InvalidEdits {
        /// The file, if they came from one.
        path: Option<PathBuf>,
        /// What is wrong with them.
        reason: String,
    },
    /// A plan of one checkpoint and another checkpoint.
    #[error("the plan was made for the model with fingerprint {expected}, but {} has fingerprint {found}", path.display())]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// Its fingerprint.
        found: String,
        /// The plan's.
        expected: String,
    },
    /// An export that the plan does not allow.
    #[error("cannot export as {mode}: {reason}")]
    Export {
        /// The export mode.
        mode: &'static str,
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
}

impl From<moe_checkpoint::Error> for Error {
    fn from(error: moe_checkpoint::Error) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}

#[cfg(feature = "repair")]
impl From<moe_importance::Error> for Error {
    fn from(error: moe_importance::Error) -> Self {
        Self::Statistics(Box::new(error))
    }
}

#[cfg(feature = "repair")]
impl From<moe_core::Error> for Error {
    fn from(error: moe_core::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

impl Error {
    pub(crate) fn invalid_plan(reason: impl Into<String>) -> Self {
        Self::InvalidPlan { path: None, reason: reason.into() }
    }

    pub(crate) fn invalid_curves(reason: impl Into<String>) -> Self {
        Self::InvalidCurves { path: None, reason: reason.into() }
    }

    pub(crate) fn invalid_edits(reason: impl Into<String>) -> Self {
        Self::InvalidEdits { path: None, reason: reason.into() }
    }

    /// The same error, saying which file it is about.
    pub(crate) fn in_file(self, file: &std::path::Path) -> Self {
        match self {
            Self::InvalidPlan { reason, .. } => Self::InvalidPlan { path: Some(file.into()), reason },
            Self::InvalidEdits { reason, .. } => Self::InvalidEdits { path: Some(file.into()), reason },
            Self::PlanVersion { found, supported, .. } => {
                Self::PlanVersion { path: Some(file.into()), found, supported }
            }
            other => other,
        }
    }
}

fn pool_name(pool: Pool) -> &'static str {
    match pool {
        Pool::Expert => "one expert",
        Pool::Layer => "one layer",
        Pool::Global => "the whole model",
    }
}

fn path_prefix(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default()
}
