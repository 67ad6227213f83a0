//! Matching by weights.

use moe_checkpoint::ExpertWeights;
use serde::{Deserialize, Serialize};

use super::{Alignment, AlignmentContext};
use crate::Result;
use crate::experts::{UnitParts, unit_vectors};
use crate::linalg::{normalize_rows, row_products};

/// The match that maximizes the summed inner products of the units' weights, `G_r G_e^T + U_r U_e^T + D_r^T D_e`.
///
/// Source: M-SMoE (arXiv 2310.01334), stage 1; its code does so for experts of two matrices and does not permute gated
/// ones. That gate, up and down all count in gated experts is inferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightMatching {
    /// Whether each unit's weights are divided by their length first, so that large units do not decide; the source
    /// does not.
    #[serde(default)]
    pub normalize: bool,
}

impl Alignment for WeightMatching {
    fn costs(&self, reference: &ExpertWeights, expert: &ExpertWeights, _: &AlignmentContext<'_>) -> Result<Vec<f32>> {
        let (mut a, length) = unit_vectors(reference, UnitParts::ALL);
        let (mut b, _) = unit_vectors(expert, UnitParts::ALL);
        if self.normalize {
            normalize_rows(&mut a, length);
            normalize_rows(&mut b, length);
        }
        let mut costs = row_products(&a, &b, length);
        costs.iter_mut().for_each(|product| *product = -*product);
        Ok(costs)
    }
}
