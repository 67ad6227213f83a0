//! Rows are merged like experts.

use serde::{Deserialize, Serialize};

use super::{RouterMix, RouterRule};
use crate::plan::LayerPlan;

/// One row per group: the mean of its members' rows (and biases) with the weights of the group. Rows of dissolved
/// experts go.
///
/// Source: UNCURL (how its router is merged is inferred). With equal rows, a bias of `ln(members)` on the logit of a
/// group makes the merge exact under a softmax over all experts; only families with a bias on the router's logits have
/// a place for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeRows {
    /// Whether `ln(members)` is added to the bias, where the family has one.
    #[serde(default = "yes")]
    pub count_bias: bool,
}

fn yes() -> bool {
    true
}

impl Default for MergeRows {
    fn default() -> Self {
        Self { count_bias: true }
    }
}

impl RouterRule for MergeRows {
    fn mix(&self, plan: &LayerPlan) -> Option<RouterMix> {
        let rows = plan.groups.iter().map(|group| match group.members[..] {
            [alone] => vec![(alone as usize, 1.0)],
            _ => group.members.iter().map(|e| *e as usize).zip(group.shares()).collect(),
        });
        let bias = |members: usize| if self.count_bias { (members as f64).ln() } else { 0.0 };
        let biases = plan.groups.iter().map(|group| bias(group.members.len())).collect();
        Some(RouterMix { rows: rows.collect(), bias: biases })
    }
}
