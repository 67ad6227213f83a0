//! Collectors: from what a model run shows to named statistics.

mod attribution;
mod channel_squares;
mod collection;
mod expert_inputs;
mod fisher_abs;
mod fisher_parts;
mod fisher_sequence;
mod gates;
mod logit_gram;
mod output_sums;
mod projection;
mod router_gradient;
mod router_usage;
mod routing;
mod unit_sums;
mod weighted_inputs;

use burn::tensor::Tensor;
use moe_checkpoint::Statistics;
use moe_core::trace::{ExpertGradients, ExpertTrace, LayerOutput, LayerTrace, RouterGradients, Signals, WaveInfo};
use serde_json::Value;

pub use attribution::Attribution;
pub use channel_squares::ChannelSquares;
pub use collection::Collection;
pub use expert_inputs::{ExpertInputRanges, ExpertInputs, RouterSample};
pub use fisher_abs::FisherAbs;
pub use fisher_parts::FisherParts;
pub use fisher_sequence::FisherSequence;
pub use logit_gram::LogitGram;
pub use output_sums::OutputSums;
pub use projection::Projection;
pub use router_gradient::RouterGradient;
pub(crate) use router_gradient::latent as latent_router_rows;
pub use router_usage::RouterUsage;
pub use routing::Routing;
pub use unit_sums::UnitSums;
pub use weighted_inputs::WeightedInputs;

use crate::statistics::{FISHER_ABS, FISHER_SEQUENCE, LOGIT_GRAM, StatisticId, StatisticSpec};
use crate::{Error, Result};

/// Adds what it sees of a wave to the statistics it provides. Never-routed experts are not shown, so that their values
/// stay 0.
///
/// Implementations keep scratch memory of one expert, and of a wave's routing, at most: what grows with the model
/// belongs into the statistics.
pub trait Collector: Send {
    /// The statistics it adds to. A [`Collection`] allocates them at the start of every wave, shown to the collector or
    /// not.
    fn statistics(&self) -> &[StatisticSpec];

    /// What it must be shown.
    fn needs(&self) -> Signals;

    /// Whether the whole model has to run, whatever it needs to be shown: for a collector that sees the model through
    /// adapters of its own.
    fn needs_forward(&self) -> bool {
        false
    }

    /// Parameters that decide its numbers, if there are any beside the names of its statistics: a seed, a size. Part of
    /// the recipe of a store.
    fn recipe(&self) -> Option<Value> {
        None
    }

    /// Whether a wave can be gone on with in its middle: whether all that it has seen of a layer is in the statistics
    /// when [`Collector::end_layer`] returns, and what it keeps of a layer's routing until then comes back with
    /// [`Collector::recall`]. If one collector cannot, a wave that was stopped begins anew for all.
    fn goes_on(&self) -> bool {
        false
    }

    /// A wave begins; of one that failed half-way nothing may be left.
    ///
    /// # Errors
    /// Whatever keeps the collector from starting.
    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        let _ = wave;
        Ok(())
    }

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

    /// The residual stream around one MoE layer; called if it needs [`Signals::streams`], in the forward sweep.
    ///
    /// # Errors
    /// What was seen does not fit the statistics.
    fn output(&mut self, output: &LayerOutput<'_>, into: &mut Statistics) -> Result<()> {
        let _ = (output, into);
        Ok(())
    }

    /// Gradients of the routing of one MoE layer; called if it needs [`Signals::router_gradients`].
    ///
    /// # Errors
    /// Gradients that do not fit the statistics.
    fn router(&mut self, gradients: &RouterGradients<'_>, into: &mut Statistics) -> Result<()> {
        let _ = (gradients, into);
        Ok(())
    }

    /// The routing of a layer whose experts are still to come, as [`Collector::layer`] was shown it by the run that
    /// this one goes on from; the statistics have what it added then.
    ///
    /// # Errors
    /// A trace that does not fit.
    fn recall(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let _ = trace;
        Ok(())
    }

    /// Routing and experts of a decoder layer have been shown: what was gathered over them is added. Layers without
    /// experts end, too, for what is seen through adapters.
    ///
    /// # Errors
    /// What was seen does not fit the statistics.
    fn end_layer(&mut self, layer: usize, into: &mut Statistics) -> Result<()> {
        let _ = (layer, into);
        Ok(())
    }

    /// A wave is over: what was gathered over all of it is added.
    ///
    /// # Errors
    /// What was seen does not fit the statistics.
    fn end_wave(&mut self, wave: &WaveInfo, into: &mut Statistics) -> Result<()> {
        let _ = (wave, into);
        Ok(())
    }
}

/// A collector and what it can be asked for.
#[derive(Clone, Copy, Debug)]
pub struct Provider {
    /// Statistics it can provide.
    pub provides: &'static [StatisticId],
    /// Makes a collector of some of them. It may provide more than it is asked for.
    pub make: fn(&[StatisticId]) -> Box<dyn Collector>,
}

/// All collectors of this crate.
pub fn registry() -> &'static [Provider] {
    const PROVIDERS: &[Provider] = &[
        Provider { provides: unit_sums::PROVIDED, make: |ids| Box::new(UnitSums::new(ids)) },
        Provider { provides: &[FISHER_SEQUENCE], make: |_| Box::new(FisherSequence::new()) },
        Provider { provides: &[FISHER_ABS], make: |_| Box::new(FisherAbs::new()) },
        Provider { provides: fisher_parts::PROVIDED, make: |ids| Box::new(FisherParts::new(ids)) },
        Provider { provides: attribution::PROVIDED, make: |ids| Box::new(Attribution::new(ids)) },
        Provider { provides: channel_squares::PROVIDED, make: |ids| Box::new(ChannelSquares::new(ids)) },
        Provider { provides: projection::PROVIDED, make: |ids| Box::new(Projection::new(ids)) },
        Provider { provides: output_sums::PROVIDED, make: |ids| Box::new(OutputSums::new(ids)) },
        Provider { provides: routing::PROVIDED, make: |ids| Box::new(Routing::new(ids)) },
        Provider { provides: router_gradient::PROVIDED, make: |ids| Box::new(RouterGradient::new(ids)) },
        Provider { provides: router_usage::PROVIDED, make: |ids| Box::new(RouterUsage::new(ids)) },
        Provider { provides: weighted_inputs::PROVIDED, make: |ids| Box::new(WeightedInputs::new(ids)) },
        Provider { provides: &[LOGIT_GRAM], make: |_| Box::new(LogitGram::new()) },
    ];
    PROVIDERS
}

/// The collectors that provide `ids`, in the order of the registry.
///
/// # Errors
/// [`Error::UnknownStatistic`] for an id that no collector of this crate provides.
pub fn collectors_for(ids: &[StatisticId]) -> Result<Vec<Box<dyn Collector>>> {
    let known = || registry().iter().flat_map(|provider| provider.provides);
    if let Some(id) = ids.iter().find(|id| !known().any(|known| known == *id)) {
        let known: Vec<_> = known().map(StatisticId::as_str).collect();
        return Err(Error::UnknownStatistic { id: id.to_string(), known: known.join(", ") });
    }
    let wanted = |provider: &Provider| provider.provides.iter().any(|id| ids.contains(id));
    Ok(registry().iter().filter(|provider| wanted(provider)).map(|provider| (provider.make)(ids)).collect())
}

/// A part of a trace that a collector that asked for it has been promised.
fn promised<T>(trace: &ExpertTrace<'_>, field: &'static str, part: Option<T>) -> Result<T> {
    part.ok_or_else(|| Error::Trace {
        layer: trace.layer,
        expert: Some(trace.expert),
        field,
        found: "nothing".into(),
        expected: "what was asked for".into(),
    })
}

fn gradients<'a>(trace: &ExpertTrace<'a>) -> Result<ExpertGradients<'a>> {
    promised(trace, "backward", trace.backward)
}

fn units<'a>(trace: &ExpertTrace<'a>) -> Result<&'a Tensor<2>> {
    promised(trace, "units", trace.units)
}

fn outputs<'a>(trace: &ExpertTrace<'a>) -> Result<&'a Tensor<2>> {
    promised(trace, "output", trace.output)
}
