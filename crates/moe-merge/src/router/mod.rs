//! What becomes of the router.

mod delete;
mod keep;
mod merge;

use serde::{Deserialize, Serialize};

pub use delete::Delete;
pub use keep::Keep;
pub use merge::MergeRows;

use crate::plan::LayerPlan;

/// A share of an expert's router row that a combination adds to a group's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterAddition {
    /// The group, by position.
    pub group: usize,
    /// The expert whose row is added.
    pub expert: usize,
    /// Its share.
    pub share: f64,
}

/// The rows of a new router as combinations of the old ones, one per group.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterMix {
    /// Old rows and their factors; a single row of factor 1 is copied byte for byte.
    pub rows: Vec<Vec<(usize, f64)>>,
    /// What is added to the bias on the logits, where the family has one.
    pub bias: Vec<f64>,
}

/// Makes a router for the groups of a layer.
pub trait RouterRule {
    /// The new rows; `None` if all E rows stay and an index map leads to the groups, so that the weights of members of
    /// one group that a token selects add up.
    fn mix(&self, plan: &LayerPlan) -> Option<RouterMix>;
}

/// Every router rule, as JSON tagged by `type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum RouterConfig {
    /// All rows stay, with an index map.
    #[default]
    Keep,
    /// Rows of experts that are not dominant go.
    Delete,
    /// One row per group, the weighted mean of its members'.
    Merge(MergeRows),
}

impl RouterConfig {
    /// Whether all rows stay.
    pub fn keeps_rows(&self) -> bool {
        matches!(self, Self::Keep)
    }
}

impl RouterRule for RouterConfig {
    fn mix(&self, plan: &LayerPlan) -> Option<RouterMix> {
        match self {
            Self::Keep => Keep.mix(plan),
            Self::Delete => Delete.mix(plan),
            Self::Merge(merge) => merge.mix(plan),
        }
    }
}

impl RouterMix {
    /// Adds shares of other rows.
    pub fn add(&mut self, additions: &[RouterAddition]) {
        for RouterAddition { group, expert, share } in additions {
            if let Some(row) = self.rows.get_mut(*group).filter(|_| *share != 0.0) {
                row.push((*expert, *share));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Group;

    fn plan() -> LayerPlan {
        let group = |dominant, members: &[u32], weights: &[f32]| Group {
            dominant,
            members: members.to_vec(),
            weights: weights.to_vec(),
        };
        LayerPlan {
            groups: vec![group(1, &[1], &[1.0]), group(2, &[0, 2], &[0.25, 0.75])],
            dissolved: vec![3],
            ..LayerPlan::default()
        }
    }

    #[test]
    fn rows_are_kept_deleted_or_merged() {
        assert_eq!(RouterConfig::Keep.mix(&plan()), None);
        let mut deleted = RouterConfig::Delete.mix(&plan()).unwrap();
        assert_eq!(deleted.rows, [vec![(1, 1.0)], vec![(2, 1.0)]]);
        assert_eq!(deleted.bias, [0.0, 0.0]);
        deleted.add(&[RouterAddition { group: 1, expert: 3, share: 0.5 }]);
        assert_eq!(deleted.rows[1], [(2, 1.0), (3, 0.5)]);
        let merged = RouterConfig::Merge(MergeRows { count_bias: true }).mix(&plan()).unwrap();
        assert_eq!(merged.rows, [vec![(1, 1.0)], vec![(0, 0.25), (2, 0.75)]]);
        assert_eq!(merged.bias, [0.0, 2f64.ln()]);
    }

    #[test]
    fn equal_rows_merge_exactly_under_a_full_softmax() {
        // Logits z, z, y of experts 0, 2, 1; their probabilities, and those of the merged rows with the count bias.
        let (z, y) = (0.7f64, -0.3f64);
        let sum = 2.0 * z.exp() + y.exp();
        let merged = RouterConfig::Merge(MergeRows { count_bias: true }).mix(&plan()).unwrap();
        let (single, pair) = (y + merged.bias[0], z + merged.bias[1]);
        let total = single.exp() + pair.exp();
        assert!((pair.exp() / total - 2.0 * z.exp() / sum).abs() < 1e-12);
        assert!((single.exp() / total - y.exp() / sum).abs() < 1e-12);
    }
}
