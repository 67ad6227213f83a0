//! Grouping: which experts become one.

mod centroids;
mod clustering;
mod dominant;
mod hierarchical;
mod kmeans;
mod retain;
mod spectral;

use serde::{Deserialize, Serialize};

pub use centroids::CappedCentroids;
pub use dominant::Dominant;
pub use hierarchical::{Hierarchical, Linkage};
pub use kmeans::KMeans;
pub use retain::Retain;
pub use spectral::Spectral;

use crate::context::LayerContext;
use crate::importance::ranked;
use crate::similarity::{Features, Similarity};
use crate::{Error, Result};

/// The groups of one layer, in the indices of its experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// Groups by ascending dominant.
    pub groups: Vec<Members>,
    /// Experts in no group: they go, and what a combination does not take of them is lost.
    pub dissolved: Vec<usize>,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// The expert that the others join.
    pub dominant: usize,
    /// All of them, the dominant included, ascending.
    pub members: Vec<usize>,
}

impl Groups {
    /// Of a label per expert; `None` is in no group. The dominant of a group is its most important member.
    pub(crate) fn from_labels(labels: &[Option<usize>], importance: &[f64]) -> Self {
        let count = labels.iter().flatten().max().map_or(0, |label| label + 1);
        let mut groups: Vec<Members> = Vec::with_capacity(count);
        for label in 0..count {
            let members: Vec<usize> = (0..labels.len()).filter(|e| labels[*e] == Some(label)).collect();
            let first = ranked(importance).into_iter().find(|e| members.contains(e));
            groups.extend(first.map(|dominant| Members { dominant, members }));
        }
        Self::sorted(groups, (0..labels.len()).filter(|e| labels[*e].is_none()).collect())
    }

    pub(crate) fn sorted(mut groups: Vec<Members>, dissolved: Vec<usize>) -> Self {
        groups.iter_mut().for_each(|group| group.members.sort_unstable());
        groups.sort_by_key(|group| group.dominant);
        Self { groups, dissolved }
    }
}

/// Puts the experts of a layer into groups.
pub trait Grouping {
    /// Exactly `count` groups of the layer's experts. Protected experts are groups of their own. A deterministic function
    /// that follows the experts, not their order: with the experts permuted, the groups are the permuted ones, as far as
    /// importance has no ties.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`], [`Error::Infeasible`] if there cannot be so many groups.
    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups>;

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    fn validate(&self) -> Result<()>;
}

/// Every grouping, as JSON tagged by `type`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum GroupingConfig {
    /// The most important experts, joined by those like them (M-SMoE, MergeMoE).
    Dominant(Dominant),
    /// The most important experts one after the other, each taking what it can hold (REAM).
    CappedCentroids(CappedCentroids),
    /// Agglomerative clustering (HC-SMoE).
    Hierarchical(Hierarchical),
    /// Spectral clustering (UNCURL).
    Spectral(Spectral),
    /// k-means++ (Sub-MoE).
    KMeans(KMeans),
    /// The most important experts stay, the others are dissolved (DERN, expert pruning).
    Retain(Retain),
}

impl GroupingConfig {
    /// The spaces that experts are compared in.
    pub fn features(&self) -> Vec<Features> {
        let of = |similarity: &Similarity| similarity.0.iter().map(|term| term.features).collect();
        match self {
            Self::Dominant(grouping) => of(&grouping.similarity),
            Self::CappedCentroids(grouping) => of(&grouping.similarity),
            Self::Spectral(grouping) => of(&grouping.similarity),
            Self::Hierarchical(grouping) => vec![grouping.features],
            Self::KMeans(grouping) => vec![grouping.features],
            Self::Retain(_) => vec![],
        }
    }

    fn grouping(&self) -> &dyn Grouping {
        match self {
            Self::Dominant(grouping) => grouping,
            Self::CappedCentroids(grouping) => grouping,
            Self::Hierarchical(grouping) => grouping,
            Self::Spectral(grouping) => grouping,
            Self::KMeans(grouping) => grouping,
            Self::Retain(grouping) => grouping,
        }
    }
}

impl Grouping for GroupingConfig {
    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let experts = context.count();
        if count == 0 || count > experts {
            return Err(context.infeasible(format!("{count} groups of {experts} experts")));
        }
        if count == experts {
            // Nothing to compare, and nothing that evidence could be missing for.
            let alone = (0..experts).map(|e| Members { dominant: e, members: vec![e] });
            return Ok(Groups { groups: alone.collect(), dissolved: Vec::new() });
        }
        let groups = self.grouping().group(context, count)?;
        debug_assert_eq!(groups.groups.len(), count);
        Ok(groups)
    }

    fn validate(&self) -> Result<()> {
        self.grouping().validate()
    }
}

/// Dominants of a layer: protected experts, and the most important ones up to `count`. In falling importance.
fn dominants(context: &LayerContext<'_>, count: usize) -> Result<Vec<usize>> {
    let protected = context.protected.iter().filter(|p| **p).count();
    if protected > count {
        return Err(context.infeasible(format!("{protected} protected experts, but {count} groups")));
    }
    if protected == count && count < context.count() {
        let reason = format!("all {count} groups are protected experts, which absorb nobody");
        return Err(context.infeasible(reason));
    }
    let ranked = context.ranked();
    let mut free = count - protected;
    let chosen = ranked.into_iter().filter(|expert| {
        let chosen = context.protected[*expert] || free > 0;
        free -= usize::from(chosen && !context.protected[*expert]);
        chosen
    });
    Ok(chosen.collect())
}

/// Clusters the experts that are not protected; those that are become groups of their own. `cluster` is given the experts by
/// falling importance and how many clusters to make, and labels them in that order.
fn cluster_unprotected(
    context: &LayerContext<'_>,
    count: usize,
    cluster: impl FnOnce(&[usize], usize) -> Result<Vec<usize>>,
) -> Result<Groups> {
    let ranked = context.ranked();
    let (alone, free): (Vec<usize>, Vec<usize>) = ranked.into_iter().partition(|e| context.protected[*e]);
    if alone.len() > count || (alone.len() == count && !free.is_empty()) {
        return Err(context.infeasible(format!("{} protected experts, but {count} groups", alone.len())));
    }
    let labels = cluster(&free, count - alone.len())?;
    let mut by_expert: Vec<Option<usize>> = vec![None; context.count()];
    for (expert, label) in free.iter().zip(labels) {
        by_expert[*expert] = Some(label);
    }
    for (at, expert) in alone.iter().enumerate() {
        by_expert[*expert] = Some(count - alone.len() + at);
    }
    let groups = Groups::from_labels(&by_expert, context.importance);
    match groups.groups.len() == count {
        true => Ok(groups),
        false => Err(Error::numerics("clustering", format!("{} clusters, expected {count}", groups.groups.len()))),
    }
}

#[cfg(test)]
mod tests;
