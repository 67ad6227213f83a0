//! Mixture-of-Experts checkpoints on disk.

mod artefact_file;
mod error;
mod provenance;
mod score_conversion;
mod scores;
mod shape;
mod statistics;
mod statistics_store;

pub use artefact_file::write_atomic;
pub use error::{Error, Result};
pub use provenance::Provenance;
pub use score_conversion::Reduction;
pub use scores::{Denominator, Granularity, LayerScores, Pool, ScoreTable};
pub use shape::{MoeLayerShape, MoeShape};
pub use statistics::{Counts, Fold, Statistics};
pub use statistics_store::StatisticsStore;
