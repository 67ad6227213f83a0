//! Pruners as lines of recipes.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::{
    ExpertPruner, GeneticPruner, NovicePruner, PruneRequest, Pruner, SubsetPruner, TwoLevelPruner, UnitPruner,
    WideExpertPruner,
};
use crate::probe::ModelProbe;
use crate::{Allocation, Needs, Result};

/// A pruner as a line of a recipe: `{"type": "unit", "allocator": {"type": "global"}}`. Every pruner of this crate has
/// a name; one of your own is [`PrunerConfig::own`].
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum PrunerConfig {
    /// FFN intermediate dimensions inside experts.
    Unit(UnitPruner),
    /// Whole experts.
    Expert(ExpertPruner),
    /// Whole experts, which the router still chooses.
    Novice(NovicePruner),
    /// Whole experts: the subset whose removal changes the output of its layer least.
    Subset(SubsetPruner),
    /// Whole experts: sets of every layer are evolved, and chosen for neighboring layers together.
    Genetic(GeneticPruner),
    /// Whole experts first, then units of the others.
    TwoLevel(TwoLevelPruner),
    /// Units, but for some experts of every layer that stay whole.
    Wide(WideExpertPruner),
    /// One that is not of this crate. Written as its own recipe, which only its own crate can read again.
    #[serde(skip)]
    Own(OwnPruner),
}

/// A pruner of another crate.
#[derive(Clone)]
pub struct OwnPruner(Arc<dyn Pruner + Send + Sync>);

impl fmt::Debug for OwnPruner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.recipe())
    }
}

/// Two with the same recipe are the same.
impl PartialEq for OwnPruner {
    fn eq(&self, other: &Self) -> bool {
        self.0.recipe() == other.0.recipe()
    }
}

impl PrunerConfig {
    /// A pruner of your own, for [`Progressive`](crate::Progressive) and everything else that takes a recipe.
    pub fn own(pruner: impl Pruner + Send + Sync + 'static) -> Self {
        Self::Own(OwnPruner(Arc::new(pruner)))
    }

    fn inner(&self) -> &dyn Pruner {
        match self {
            Self::Unit(pruner) => pruner,
            Self::Expert(pruner) => pruner,
            Self::Novice(pruner) => pruner,
            Self::Subset(pruner) => pruner,
            Self::Genetic(pruner) => pruner,
            Self::TwoLevel(pruner) => pruner,
            Self::Wide(pruner) => pruner,
            Self::Own(pruner) => &*pruner.0,
        }
    }
}

impl Serialize for PrunerConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.recipe().serialize(serializer)
    }
}

impl Pruner for PrunerConfig {
    fn recipe(&self) -> Value {
        self.inner().recipe()
    }

    fn needs(&self) -> Needs {
        self.inner().needs()
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.inner().allocate_with(request, probe)
    }
}
