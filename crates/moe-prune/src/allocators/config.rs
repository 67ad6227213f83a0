//! Allocators as lines of recipes.

use std::fmt;
use std::sync::Arc;

use moe_checkpoint::Granularity;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::{
    Allocation, AllocationRequest, Allocator, Coverage, DepthPrior, Evolution, Global, Hybrid, Normalized, PerLayer,
    RateDistortion, Rco, Uniform,
};
use crate::probe::ModelProbe;
use crate::{Needs, Result};

/// An allocator as a line of a recipe: `{"type": "global"}`. Every allocator of this crate has a name; one of your own
/// is [`AllocatorConfig::own`].
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AllocatorConfig {
    /// Every expert (or, of whole experts, every layer) drops the same fraction.
    Uniform(Uniform),
    /// Every layer drops the same fraction; its experts compete.
    Layer(PerLayer),
    /// All units of the model compete.
    Global(Global),
    /// All units of the model compete by scores that are made comparable layer by layer.
    Normalized(Normalized),
    /// A guaranteed share for every layer, the rest by global rank.
    Hybrid(Hybrid),
    /// Every layer and expert keeps a part of its own scores that follows from its weight as a whole.
    Coverage(Coverage),
    /// Shares by depth.
    DepthPrior(DepthPrior),
    /// The least sum of distortion curves.
    RateDistortion(RateDistortion),
    /// Gradient search over expert masks.
    Rco(Rco),
    /// Evolution of the counts per layer.
    Evolution(Evolution),
    /// One that is not of this crate. Written as its own recipe, which only its own crate can read again.
    #[serde(skip)]
    Own(OwnAllocator),
}

/// An allocator of another crate.
#[derive(Clone)]
pub struct OwnAllocator(Arc<dyn Allocator + Send + Sync>);

impl fmt::Debug for OwnAllocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.recipe())
    }
}

/// Two with the same recipe are the same.
impl PartialEq for OwnAllocator {
    fn eq(&self, other: &Self) -> bool {
        self.0.recipe() == other.0.recipe()
    }
}

impl AllocatorConfig {
    /// An allocator of your own, for every pruner that takes one.
    pub fn own(allocator: impl Allocator + Send + Sync + 'static) -> Self {
        Self::Own(OwnAllocator(Arc::new(allocator)))
    }

    fn inner(&self) -> &dyn Allocator {
        match self {
            Self::Uniform(allocator) => allocator,
            Self::Layer(allocator) => allocator,
            Self::Global(allocator) => allocator,
            Self::Normalized(allocator) => allocator,
            Self::Hybrid(allocator) => allocator,
            Self::Coverage(allocator) => allocator,
            Self::DepthPrior(allocator) => allocator,
            Self::RateDistortion(allocator) => allocator,
            Self::Rco(allocator) => allocator,
            Self::Evolution(allocator) => allocator,
            Self::Own(allocator) => &*allocator.0,
        }
    }
}

impl Serialize for AllocatorConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.recipe().serialize(serializer)
    }
}

impl Allocator for AllocatorConfig {
    fn recipe(&self) -> Value {
        self.inner().recipe()
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        self.inner().needs(granularity)
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.inner().allocate_with(request, probe)
    }
}
