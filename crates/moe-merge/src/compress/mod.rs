//! MC-SMoE's second stage: a matrix as a low-rank part and a few dense rows.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How merged matrices are compressed: `W = L R + S` with `L R` of some rank and few rows of S that are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    /// Rank of `L R`.
    pub rank: usize,
    /// Share of the rows of S that are kept, over all matrices together.
    pub keep_rows: f64,
    /// What rows are ranked by.
    #[serde(default)]
    pub rows: RowScore,
}

/// What rows of S are ranked by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowScore {
    /// Mean absolute value of the row.
    #[default]
    Magnitude,
    /// Mean square of the row times the importance of the unit it belongs to: Fisher scores of units.
    Fisher,
}

impl Compression {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    pub fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::parameter("compression.rank", 0, "at least 1"));
        }
        match (0.0..=1.0).contains(&self.keep_rows) {
            true => Ok(()),
            false => Err(Error::parameter("compression.keep_rows", self.keep_rows, "a number in [0, 1]")),
        }
    }
}
