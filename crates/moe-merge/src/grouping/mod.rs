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

/// Dominants of a layer that others may join: as [`retained`], with somebody among them who absorbs.
fn dominants(context: &LayerContext<'_>, count: usize) -> Result<Vec<usize>> {
    let retained = retained(context, count)?;
    if retained.len() < context.count() && retained.iter().all(|expert| context.protected[*expert]) {
        let reason = format!("all {count} groups are protected experts, which absorb nobody");
        return Err(context.infeasible(reason));
    }
    Ok(retained)
}

/// Protected experts, and the most important ones up to `count`, as many of each group of the router. In falling importance.
fn retained(context: &LayerContext<'_>, count: usize) -> Result<Vec<usize>> {
    let ranked = context.ranked();
    let (blocks, each) = context.blocks(count)?;
    let mut chosen = vec![false; context.count()];
    for block in blocks {
        let protected = block.clone().filter(|expert| context.protected[*expert]).count();
        if protected > each {
            return Err(context.infeasible(format!("{protected} protected experts, but {each} groups")));
        }
        block.clone().filter(|expert| context.protected[*expert]).for_each(|expert| chosen[expert] = true);
        let free = ranked.iter().filter(|expert| block.contains(expert) && !context.protected[**expert]);
        free.take(each - protected).for_each(|expert| chosen[*expert] = true);
    }
    Ok(ranked.into_iter().filter(|expert| chosen[*expert]).collect())
}

/// Clusters the experts that are not protected; those that are become groups of their own. `cluster` is given the experts by
/// falling importance and how many clusters to make, and labels them in that order. Where as many dominants must stay in each group
/// of the router, clusters stay within one.
fn cluster_unprotected(
    context: &LayerContext<'_>,
    count: usize,
    mut cluster: impl FnMut(&[usize], usize) -> Result<Vec<usize>>,
) -> Result<Groups> {
    let (blocks, each) = context.blocks(count)?;
    let mut by_expert: Vec<Option<usize>> = vec![None; context.count()];
    for (at, block) in blocks.into_iter().enumerate() {
        let ranked = context.ranked().into_iter().filter(|expert| block.contains(expert));
        let (alone, free): (Vec<usize>, Vec<usize>) = ranked.partition(|e| context.protected[*e]);
        if alone.len() > each || (alone.len() == each && !free.is_empty()) {
            return Err(context.infeasible(format!("{} protected experts, but {each} groups", alone.len())));
        }
        let labels = if free.is_empty() { Vec::new() } else { cluster(&free, each - alone.len())? };
        for (expert, label) in free.iter().zip(labels) {
            by_expert[*expert] = Some(at * each + label);
        }
        for (further, expert) in alone.iter().enumerate() {
            by_expert[*expert] = Some(at * each + each - alone.len() + further);
        }
    }
    let groups = Groups::from_labels(&by_expert, context.importance);
    match groups.groups.len() == count {
        true => Ok(groups),
        false => Err(Error::numerics("clustering", format!("{} clusters, expected {count}", groups.groups.len()))),
    }
}

#[cfg(test)]
mod tests;
