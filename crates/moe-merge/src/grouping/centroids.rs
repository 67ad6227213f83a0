//! Centroids that take what they can hold.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Dominant, Grouping, Groups, Members, dominants, tagged};
use crate::Result;
use crate::context::LayerContext;
use crate::similarity::{Features, Similarity};

/// The most important experts are centroids. From the most to the least important, each takes the experts nearest to it
/// that are left until it has `capacity` members, itself included. So many centroids stay alone.
///
/// Source: REAM (arXiv 2604.04356). Capacity 0 is its other mode: every expert goes to the centroid it is nearest to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CappedCentroids {
    /// What makes experts alike.
    pub similarity: Similarity,
    /// Most members of a group, the centroid included. By default an eighth of the experts of the layer, which are the
    /// 16 of 128 that REAM was measured with, or as many as fill the groups where that is more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<usize>,
}

impl Grouping for CappedCentroids {
    fn recipe(&self) -> Value {
        tagged("capped_centroids", self)
    }

    fn needs(&self) -> Vec<Features> {
        self.similarity.features()
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        if self.capacity == Some(0) {
            return Dominant { similarity: self.similarity.clone(), capacity: None }.group(context, count);
        }
        let experts = context.count();
        let centroids = dominants(context, count)?;
        let similarity = self.similarity.matrix(context)?;
        let mut left: Vec<usize> = context.ranked().into_iter().filter(|e| !centroids.contains(e)).collect();
        let open = centroids.iter().filter(|centroid| !context.protected[**centroid]).count();
        let filling = (left.len() + open).div_ceil(open.max(1));
        let capacity = self.capacity.unwrap_or_else(|| (experts / 8).max(filling));
        let mut groups = Vec::with_capacity(count);
        for centroid in centroids {
            let mut members = vec![centroid];
            if !context.protected[centroid] {
                let likeness = |expert: usize| similarity[centroid * experts + expert];
                // Stable: of equally near ones, the more important is taken.
                left.sort_by(|a, b| likeness(*b).total_cmp(&likeness(*a)));
                members.extend(left.drain(..left.len().min(capacity - 1)));
                left.sort_by(|a, b| context.importance[*b].total_cmp(&context.importance[*a]).then(a.cmp(b)));
            }
            groups.push(Members { dominant: centroid, members });
        }
        if !left.is_empty() {
            let reason = format!(
                "{experts} experts do not fit into {count} groups of at most {capacity}: {} are left over",
                left.len()
            );
            return Err(context.infeasible(reason));
        }
        Ok(Groups::sorted(groups, Vec::new()))
    }

    fn validate(&self) -> Result<()> {
        self.similarity.validate()
    }
}
