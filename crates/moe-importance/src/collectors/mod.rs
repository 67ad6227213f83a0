//! Collectors: from what a model run shows to named statistics.

mod activation;
mod collection;
mod fisher_abs;
mod fisher_sequence;
mod fisher_token;
mod router_probability;
mod routing;

use std::borrow::Cow;
use std::fmt;

use moe_checkpoint::{Fold, Granularity, Statistics};
use moe_core::trace::{ExpertGradients, ExpertTrace, LayerTrace, Signals};
use serde::{Deserialize, Serialize};

pub use activation::{ACTIVATION_MAGNITUDE, Activation};
pub use collection::Collection;
pub use fisher_abs::{FISHER_ABS, FisherAbs};
pub use fisher_sequence::{FISHER_SEQUENCE, FisherSequence};
pub use fisher_token::{FISHER_TOKEN, FisherToken};
pub use router_probability::{ROUTER_PROBABILITY, RouterProbability};
pub use routing::{ROUTED_TOKENS, ROUTING_WEIGHT, Routing};

use crate::{Error, Result};

/// Name of a statistic, such as `fisher.token`: the key under which collectors add and scorers read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StatisticId(Cow<'static, str>);

impl StatisticId {
    /// A fixed name.
    pub const fn new(name: &'static str) -> Self {
        Self(Cow::Borrowed(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for StatisticId {
    fn from(name: String) -> Self {
        Self(Cow::Owned(name))
    }
}

impl fmt::Display for StatisticId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A statistic that a collector adds to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatisticSpec {
    /// Its name.
    pub id: StatisticId,
    /// A value per unit or per expert.
    pub granularity: Granularity,
    /// How two waves become one.
    pub fold: Fold,
}

impl StatisticSpec {
    /// A sum with one value per unit.
    pub const fn unit_sum(id: StatisticId) -> Self {
        Self { id, granularity: Granularity::Unit, fold: Fold::Sum }
    }

    /// A sum with one value per expert.
    pub const fn expert_sum(id: StatisticId) -> Self {
        Self { id, granularity: Granularity::Expert, fold: Fold::Sum }
    }
}

/// Adds what it sees of a wave to the statistics it provides. Never-routed experts are not shown, so that their values
/// stay 0.
///
/// Implementations keep scratch memory of one expert at most: what grows with the model belongs into the statistics.
pub trait Collector: Send {
    /// The statistics it adds to. A [`Collection`] allocates them at the start of every wave, shown to the collector or
    /// not.
    fn statistics(&self) -> &[StatisticSpec];

    /// What it must be shown.
    fn needs(&self) -> Signals;

    /// Routing of one MoE layer; called if it needs [`Signals::routing`].
    ///
    /// # Errors
    /// A trace that does not fit the statistics.
    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> Result<()> {
        let _ = (trace, into);
        Ok(())
    }

    /// One expert and its tokens; called if it needs [`Signals::units`], [`Signals::outputs`] or
    /// [`Signals::gradients`].
    ///
    /// # Errors
    /// A trace that does not fit the statistics.
    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let _ = (trace, into);
        Ok(())
    }
}

/// Makes a collector.
pub type Make = fn() -> Box<dyn Collector>;

/// All collectors of this crate.
pub fn registry() -> &'static [Make] {
    const COLLECTORS: &[Make] = &[
        || Box::new(FisherToken::new()),
        || Box::new(FisherSequence::new()),
        || Box::new(FisherAbs::new()),
        || Box::new(Activation::new()),
        || Box::new(Routing::new()),
        || Box::new(RouterProbability::new()),
    ];
    COLLECTORS
}

/// The collectors that provide `ids`, each once, in the order of the registry.
///
/// # Errors
/// [`Error::UnknownStatistic`] for an id that no collector of this crate provides.
pub fn collectors_for(ids: &[StatisticId]) -> Result<Vec<Box<dyn Collector>>> {
    let all: Vec<Box<dyn Collector>> = registry().iter().map(|make| make()).collect();
    let provides = |collector: &dyn Collector, id: &StatisticId| collector.statistics().iter().any(|s| s.id == *id);
    if let Some(id) = ids.iter().find(|id| !all.iter().any(|c| provides(c.as_ref(), id))) {
        let known: Vec<_> = all.iter().flat_map(|c| c.statistics()).map(|s| s.id.as_str()).collect();
        return Err(Error::UnknownStatistic { id: id.to_string(), known: known.join(", ") });
    }
    Ok(all.into_iter().filter(|c| ids.iter().any(|id| provides(c.as_ref(), id))).collect())
}

/// The gradients of a trace, which a collector that asked for them has been promised.
fn gradients<'a>(trace: &ExpertTrace<'a>) -> Result<ExpertGradients<'a>> {
    trace.backward.ok_or_else(|| Error::Trace {
        layer: trace.layer,
        expert: Some(trace.expert),
        field: "backward",
        found: "nothing".into(),
        expected: "gradients, as asked for".into(),
    })
}

/// The unit activations of a trace, which a collector that asked for them has been promised.
fn units<'a>(trace: &ExpertTrace<'a>) -> Result<&'a burn::tensor::Tensor<2>> {
    trace.units.ok_or_else(|| Error::Trace {
        layer: trace.layer,
        expert: Some(trace.expert),
        field: "units",
        found: "nothing".into(),
        expected: "unit activations, as asked for".into(),
    })
}
