//! MC-SMoE's second stage: a matrix as a low-rank part and a few dense rows.

mod expert;
mod matrix;
mod model;
mod ranks;

use serde::{Deserialize, Serialize};

pub use expert::CompactExpert;
pub use matrix::LowRankSparse;
pub use model::{COMPACT_FILE, CompactModel, CompactReport, CompactedModel};
#[cfg(feature = "engine")]
pub(crate) use model::{Set, store, stored_sets};
pub use ranks::Ranks;

use crate::{Error, Result};

/// How merged matrices are compressed: `W = L R + S` with `L R` of some rank and few rows of S that are not zero.
///
/// Source: MC-SMoE (arXiv 2310.01334), stage 6, without its training (feature `engine` has `CompactTraining`): `L = U_r
/// sqrt(S_r)`, `R = sqrt(S_r) V_r^T` from the leading singular triples, `S = W - L R`; instead of importance smoothed
/// over steps of training, rows of S are ranked once, over all matrices together, by the mean over each row.
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
    /// How the rank is shared out over experts.
    #[serde(default)]
    pub ranks: Ranks,
}

/// What rows of S are ranked by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowScore {
    /// Mean absolute element.
    #[default]
    Magnitude,
    /// Mean of squared elements times the Fisher score of the unit they belong to: that of the row in gate and up, that
    /// of the column in down. A second-order estimate of what dropping the row costs, without cross terms.
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

    /// Whether ranks or rows follow from Fisher scores of units, which have to be given then.
    pub fn needs_scores(&self) -> bool {
        self.rows == RowScore::Fisher || self.ranks == Ranks::Importance
    }

    /// Checks that Fisher scores are given where they are needed.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    pub fn check_scores(&self, given: bool) -> Result<()> {
        let (field, found, otherwise) = match (given, self.ranks, self.rows) {
            (true, ..) | (_, Ranks::Same, RowScore::Magnitude) => return Ok(()),
            (_, Ranks::Importance, _) => ("compression.ranks", "importance", "same"),
            (_, _, RowScore::Fisher) => ("compression.rows", "fisher", "magnitude"),
        };
        let found = format!("`{found}` without Fisher scores of units");
        let expected = format!("`{otherwise}`, or Fisher scores, as the step `decompose` of a recipe collects them");
        Err(Error::parameter(field, found, expected))
    }

    /// Share of rows that MC-SMoE's training keeps at a step of `steps`, on its way from 1 to
    /// [`keep_rows`](Self::keep_rows): 1 for the first `warm_up` steps, the final value for the last `cool_down`, cubic
    /// in between: `keep = final + (1 - final) (1 - (t - t_0) / (T - t_0 - t_1))^3`.
    ///
    /// ```
    /// let compression = moe_merge::Compression {
    ///     rank: 32,
    ///     keep_rows: 0.1,
    ///     rows: Default::default(),
    ///     ranks: Default::default(),
    /// };
    /// assert_eq!(compression.keep_at(50, 1000, 50, 200), 1.0);
    /// assert!((compression.keep_at(425, 1000, 50, 200) - (0.1 + 0.9 / 8.0)).abs() < 1e-12);
    /// assert_eq!(compression.keep_at(800, 1000, 50, 200), 0.1);
    /// ```
    pub fn keep_at(&self, step: usize, steps: usize, warm_up: usize, cool_down: usize) -> f64 {
        let between = steps.saturating_sub(warm_up + cool_down);
        if step <= warm_up {
            return 1.0;
        }
        if step >= warm_up + between {
            return self.keep_rows;
        }
        let left = 1.0 - (step - warm_up) as f64 / between as f64;
        self.keep_rows + (1.0 - self.keep_rows) * left.powi(3)
    }
}

/// The rows that are kept of several matrices with these scores, `floor(keep * rows)` of all, ties to the earlier
/// matrix and row; ascending per matrix.
pub(crate) fn kept_rows(scores: &[Vec<f64>], keep: f64) -> Vec<Vec<u32>> {
    let mut order: Vec<(usize, u32)> =
        scores.iter().enumerate().flat_map(|(m, rows)| (0..rows.len() as u32).map(move |row| (m, row))).collect();
    let count = ((order.len() as f64 * keep).floor() as usize).min(order.len());
    let score = |(m, row): &(usize, u32)| scores[*m][*row as usize];
    order.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
    let mut kept: Vec<Vec<u32>> = vec![Vec::new(); scores.len()];
    order.iter().take(count).for_each(|(m, row)| kept[*m].push(*row));
    kept.iter_mut().for_each(|rows| rows.sort_unstable());
    kept
}

#[cfg(test)]
mod tests;
