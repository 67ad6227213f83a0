//! Grouping: which experts become one.

mod centroids;
mod clustering;
mod dominant;
mod hierarchical;
mod kmeans;
mod retain;
mod spectral;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use centroids::CappedCentroids;
pub use dominant::Dominant;
pub use hierarchical::{Hierarchical, Linkage};
pub use kmeans::KMeans;
pub use retain::Retain;
pub use spectral::Spectral;

use crate::context::LayerContext;
use crate::importance::ranked;
use crate::similarity::Features;
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
    /// Of a label per expert, counted from 0; `None` is in no group. The dominant of a group is its most important
    /// member.
    pub fn of_labels(labels: &[Option<usize>], importance: &[f64]) -> Self {
        let count = labels.iter().flatten().max().map_or(0, |label| label + 1);
        let mut groups: Vec<Members> = Vec::with_capacity(count);
        for label in 0..count {
            let members: Vec<usize> = (0..labels.len()).filter(|e| labels[*e] == Some(label)).collect();
            let first = ranked(importance).into_iter().find(|e| members.contains(e));
            groups.extend(first.map(|dominant| Members { dominant, members }));
        }
        Self::sorted(groups, (0..labels.len()).filter(|e| labels[*e].is_none()).collect())
    }

    /// Refuses what is no division of a layer's experts into `count` groups with protected experts alone.
    fn check(&self, context: &LayerContext<'_>, count: usize, own: &OwnGrouping) -> Result<()> {
        let (recipe, dissolves) = (&own.recipe, own.dissolves());
        let wrong = |found: String, expected: &str| {
            Err(Error::parameter("grouping", format!("{recipe}: layer {}: {found}", context.layer), expected))
        };
        let mut seen = vec![0usize; context.count()];
        let members = self.groups.iter().flat_map(|group| &group.members).chain(&self.dissolved);
        for expert in members {
            match seen.get_mut(*expert) {
                Some(seen) => *seen += 1,
                None => return wrong(format!("expert {expert}"), "an expert of the layer"),
            }
        }
        if let Some(expert) = seen.iter().position(|times| *times != 1) {
            return wrong(format!("expert {expert} {} times", seen[expert]), "every expert once");
        }
        if let Some(expert) = self.dissolved.first().filter(|_| !dissolves) {
            return wrong(
                format!("expert {expert} in no group"),
                "every expert in a group: `dissolves` says otherwise",
            );
        }
        if self.groups.len() != count {
            return wrong(format!("{} groups", self.groups.len()), &format!("{count}"));
        }
        if let Some(group) = self.groups.iter().find(|group| !group.members.contains(&group.dominant)) {
            return wrong(format!("dominant {} outside its group", group.dominant), "one of its members");
        }
        let shares = |group: &&Members| group.members.len() > 1 && group.members.iter().any(|e| context.protected[*e]);
        match self.groups.iter().find(shares) {
            Some(group) => wrong(format!("a protected expert among {:?}", group.members), "protected experts alone"),
            None => Ok(()),
        }
    }

    pub(crate) fn sorted(mut groups: Vec<Members>, dissolved: Vec<usize>) -> Self {
        groups.iter_mut().for_each(|group| group.members.sort_unstable());
        groups.sort_by_key(|group| group.dominant);
        Self { groups, dissolved }
    }
}

/// Puts the experts of a layer into groups.
///
/// One of your own needs three functions, and becomes part of a [`Recipe`](crate::Recipe) by [`GroupingConfig::own`]:
///
/// ```
/// use moe_merge::{Features, Grouping, GroupingConfig, Groups, LayerContext, Recipe, Result};
/// use serde_json::{Value, json};
///
/// /// Deals experts out to the groups like cards, the most important first.
/// struct Dealt;
///
/// impl Grouping for Dealt {
///     fn recipe(&self) -> Value {
///         json!({ "type": "dealt" })
///     }
///
///     fn needs(&self) -> Vec<Features> {
///         Vec::new()
///     }
///
///     fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
///         let mut labels = vec![None; context.count()];
///         context.ranked().into_iter().enumerate().for_each(|(rank, expert)| labels[expert] = Some(rank % count));
///         Ok(Groups::of_labels(&labels, context.importance))
///     }
/// }
///
/// let recipe = Recipe { grouping: GroupingConfig::own(Dealt), ..Recipe::named("m-smoe")? };
/// # recipe.validate()?;
/// # Ok::<(), moe_merge::Error>(())
/// ```
pub trait Grouping {
    /// What it is called and how it works: JSON with a `type`, as recipes and plans carry it.
    fn recipe(&self) -> Value;

    /// The spaces that it compares experts in, so that the evidence for them is collected.
    fn needs(&self) -> Vec<Features>;

    /// Whether it leaves experts without a group, whose rows of the router must go then.
    fn dissolves(&self) -> bool {
        false
    }

    /// Exactly `count` groups of the layer's experts, at most as many as there are experts. Protected experts are
    /// groups of their own. A deterministic function that follows the experts, not their order: with the experts
    /// permuted, the groups are the permuted ones, as far as importance has no ties.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`], [`Error::Infeasible`] if there cannot be so many groups.
    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups>;

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    fn validate(&self) -> Result<()> {
        Ok(())
    }
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
    /// One that is not of this crate: [`GroupingConfig::own`].
    Own(OwnGrouping),
}

/// A grouping of another crate, by its recipe. Read from a plan it says how the plan was made, and groups nothing.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnGrouping {
    recipe: Value,
    #[serde(skip)]
    grouping: Option<Arc<dyn Grouping + Send + Sync>>,
}

impl fmt::Debug for OwnGrouping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.recipe)
    }
}

/// Two with the same recipe are the same.
impl PartialEq for OwnGrouping {
    fn eq(&self, other: &Self) -> bool {
        self.recipe == other.recipe
    }
}

impl Grouping for OwnGrouping {
    fn recipe(&self) -> Value {
        self.recipe.clone()
    }

    fn needs(&self) -> Vec<Features> {
        self.grouping.as_ref().map(|grouping| grouping.needs()).unwrap_or_default()
    }

    fn dissolves(&self) -> bool {
        self.grouping.as_ref().is_some_and(|grouping| grouping.dissolves())
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let Some(grouping) = &self.grouping else {
            let expected = "one of this crate, or one that the program gives by `GroupingConfig::own`";
            return Err(Error::parameter("grouping", &self.recipe, expected));
        };
        let groups = grouping.group(context, count)?;
        groups.check(context, count, self)?;
        Ok(groups)
    }

    fn validate(&self) -> Result<()> {
        self.grouping.as_ref().map_or(Ok(()), |grouping| grouping.validate())
    }
}

impl GroupingConfig {
    /// A grouping of your own, for everything that takes a [`Recipe`](crate::Recipe). Plans that are made with it can
    /// be read and applied wherever they are; made again only by a program that has it.
    pub fn own(grouping: impl Grouping + Send + Sync + 'static) -> Self {
        Self::Own(OwnGrouping { recipe: grouping.recipe(), grouping: Some(Arc::new(grouping)) })
    }

    fn grouping(&self) -> &dyn Grouping {
        match self {
            Self::Dominant(grouping) => grouping,
            Self::CappedCentroids(grouping) => grouping,
            Self::Hierarchical(grouping) => grouping,
            Self::Spectral(grouping) => grouping,
            Self::KMeans(grouping) => grouping,
            Self::Retain(grouping) => grouping,
            Self::Own(grouping) => grouping,
        }
    }
}

impl Grouping for GroupingConfig {
    fn recipe(&self) -> Value {
        self.grouping().recipe()
    }

    fn needs(&self) -> Vec<Features> {
        self.grouping().needs()
    }

    fn dissolves(&self) -> bool {
        self.grouping().dissolves()
    }

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

/// `grouping` as JSON with this `type`.
fn tagged(name: &str, grouping: &impl Serialize) -> Value {
    let mut recipe = serde_json::json!({ "type": name });
    if let (Value::Object(recipe), Ok(Value::Object(fields))) = (&mut recipe, serde_json::to_value(grouping)) {
        recipe.extend(fields);
    }
    recipe
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

/// Protected experts, and the most important ones up to `count`, as many of each group of the router. In falling
/// importance.
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

/// Clusters the experts that are not protected; those that are become groups of their own. `cluster` is given the
/// experts by falling importance and how many clusters to make, and labels them in that order. Where as many dominants
/// must stay in each group of the router, clusters stay within one.
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
    let groups = Groups::of_labels(&by_expert, context.importance);
    match groups.groups.len() == count {
        true => Ok(groups),
        false => Err(Error::numerics("clustering", format!("{} clusters, expected {count}", groups.groups.len()))),
    }
}

#[cfg(test)]
mod tests;
