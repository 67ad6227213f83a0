//! The weighted average.

use serde::{Deserialize, Serialize};

use super::{Combination, GroupSink, GroupWeights, LayerJob, averaged, combine_groups};
use crate::Result;
use crate::router::RouterAddition;

/// `W = sum_e w_e W_e` matrix by matrix, weights summing to 1 in the group.
///
/// Source: M-SMoE (arXiv 2310.01334), stage 4, and HC-SMoE (arXiv 2410.08589) by usage; REAM (arXiv 2604.04356) by
/// saliency.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Average {
    /// The weights.
    pub weights: GroupWeights,
}

impl Combination for Average {
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        combine_groups(job, sink, |group| averaged(job, group))
    }

    fn weights(&self) -> GroupWeights {
        self.weights
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }
}
