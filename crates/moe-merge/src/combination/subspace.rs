//! The average in a shared subspace.

use faer::Mat;
use serde::{Deserialize, Serialize};

use super::{Combination, GroupSink, GroupWeights, LayerJob, averaged, combine_groups};
use crate::linalg::{cross_gram, leading_eigenvectors, product, transposed, view};
use crate::plan::Group;
use crate::router::RouterAddition;
use crate::{Error, Result};

/// For each projection, the members' matrices side by side, `[W_1 … W_n] = U S [V_1 … V_n]`; the merged matrix is
/// `U S sum_e w_e V_e`.
///
/// Source: Sub-MoE (arXiv 2506.23266). Since `U S V_e = W_e`, at full rank this *is* the weighted average; a smaller
/// rank is its projection on the leading left singular vectors of the members, `U_r U_r^T sum_e w_e W_e`, which is how
/// it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subspace {
    /// The weights.
    pub weights: GroupWeights,
    /// How many singular vectors are kept.
    #[serde(default)]
    pub rank: SubspaceRank,
}

/// How many singular vectors are kept of each projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubspaceRank {
    /// All singular values.
    #[default]
    Full,
    /// This many, at most.
    Rank(usize),
    /// As many as hold this share of the squared singular values, in (0, 1].
    Energy(f64),
}

impl Combination for Subspace {
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        combine_groups(job, sink, |group| {
            let mut merged = averaged(job, group)?;
            if self.rank != SubspaceRank::Full && merged.width > 0 {
                let (width, hidden) = (merged.width, merged.hidden);
                let [gate, up, down] = grams(job, group, width, hidden)?;
                merged.gate = self.project(&gate, &merged.gate, hidden)?;
                merged.up = self.project(&up, &merged.up, hidden)?;
                merged.down = self.project(&down, &merged.down, width)?;
            }
            Ok(merged)
        })
    }

    fn weights(&self) -> GroupWeights {
        self.weights
    }

    fn validate(&self) -> Result<()> {
        match self.rank {
            SubspaceRank::Rank(0) => Err(Error::parameter("combination.rank", 0, "at least 1")),
            SubspaceRank::Energy(share) if !(share > 0.0 && share <= 1.0) => {
                Err(Error::parameter("combination.rank.energy", share, "a number in (0, 1]"))
            }
            _ => Ok(()),
        }
    }
}

impl Subspace {
    /// Projects the columns of a matrix `[rows, cols]` on the leading eigenvectors of `gram [rows, rows]`.
    fn project(&self, gram: &Mat<f64>, matrix: &[f32], cols: usize) -> Result<Vec<f32>> {
        let rows = gram.nrows();
        let (vectors, values) = leading_eigenvectors(gram, rows)?;
        let rank = match self.rank {
            SubspaceRank::Full => rows,
            SubspaceRank::Rank(rank) => rank.min(rows),
            SubspaceRank::Energy(share) => {
                let total: f64 = values.iter().map(|v| v.max(0.0)).sum();
                let mut held = 0.0;
                let enough = values.iter().position(|value| {
                    held += value.max(0.0);
                    held >= share * total
                });
                enough.map_or(rows, |last| last + 1)
            }
        };
        let basis: Vec<f32> = (0..rows * rank).map(|k| vectors[(k / rank, k % rank)] as f32).collect();
        let basis = view(&basis, rows, rank);
        let inner = product(basis.transpose(), view(matrix, rows, cols)); // [rank, cols]
        Ok(product(basis, view(&inner, rank, cols)))
    }
}

/// `sum_e W_e W_e^T` of gate, up and down.
fn grams(job: &LayerJob<'_>, group: &Group, width: usize, hidden: usize) -> Result<[Mat<f64>; 3]> {
    let mut grams = [Mat::zeros(width, width), Mat::zeros(width, width), Mat::zeros(hidden, hidden)];
    job.aligned(group, &mut |member| {
        let w = member.weights;
        for (gram, (matrix, rows, cols)) in
            grams.iter_mut().zip([(&w.gate, width, hidden), (&w.up, width, hidden), (&w.down, hidden, width)])
        {
            let columns = transposed(matrix, rows, cols);
            *gram += cross_gram(&columns, rows, &columns, rows);
        }
        Ok(())
    })?;
    Ok(grams)
}
