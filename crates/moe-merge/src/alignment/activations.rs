//! Matching by activations.

use moe_checkpoint::ExpertWeights;
use serde::{Deserialize, Serialize};

use super::{Alignment, AlignmentContext, missing_sample, unit_distances};
use crate::Result;
use crate::linalg::{normalize_rows, row_products, transposed};

/// The match with the smallest summed distance of the units' activations on sampled tokens, each unit's divided by
/// their length. Tokens are those of the layer, whether routed to the expert or not.
///
/// Source: REAM (arXiv 2604.04356), step 4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationMatching {}

impl Alignment for ActivationMatching {
    fn costs(
        &self,
        reference: &ExpertWeights,
        expert: &ExpertWeights,
        context: &AlignmentContext<'_>,
    ) -> Result<Vec<f32>> {
        let sample = context.sample.filter(|sample| sample.tokens() > 0);
        let sample = sample.ok_or_else(|| missing_sample(context.layer))?;
        let rows = |weights: &ExpertWeights| -> Result<Vec<f32>> {
            let units = weights.unit_activations(&sample.inputs, context.activation); // [S, I]
            let mut rows = transposed(&units, sample.tokens(), weights.width); // [I, S]
            normalize_rows(&mut rows, sample.tokens());
            Ok(rows)
        };
        Ok(unit_distances(row_products(&rows(reference)?, &rows(expert)?, sample.tokens())))
    }

    fn needs_sample(&self) -> bool {
        true
    }
}
