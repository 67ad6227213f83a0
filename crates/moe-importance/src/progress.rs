//! How far a collection is, waves in progress included.

use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use moe_checkpoint::MoeShape;
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerOutput, LayerTrace, Observer, RouterGradients, Signals, SweepPart, WaveInfo};

use crate::Collection;

/// How far a collection is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Waves to collect in all.
    pub waves: usize,
    /// Waves finished, those of earlier runs included.
    pub waves_done: usize,
    /// Waves that earlier runs finished.
    pub waves_resumed: usize,
    /// Tokens of all waves.
    pub tokens: u64,
    /// Tokens of the waves finished, and of the wave in progress the part that its finished layers stand for.
    pub tokens_done: u64,
    /// Tokens of the waves that earlier runs finished, and of a wave that one left unfinished the part that it did.
    pub tokens_resumed: u64,
    /// Time since this run began.
    pub elapsed: Duration,
    /// Mean cross-entropy over the predicted tokens of the waves run so far, in nats, if it is known.
    pub loss: Option<f64>,
}

impl Progress {
    /// Of waves that are all there.
    pub(crate) fn resumed(waves: &[Wave]) -> Self {
        let tokens = waves.iter().map(|wave| wave.tokens() as u64).sum();
        Self {
            waves: waves.len(),
            waves_done: waves.len(),
            waves_resumed: waves.len(),
            tokens,
            tokens_done: tokens,
            tokens_resumed: tokens,
            ..Self::default()
        }
    }

    /// Tokens per second of this run; none before it has done any.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let (tokens, seconds) = (self.tokens_done - self.tokens_resumed, self.elapsed.as_secs_f64());
        (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
    }

    /// Time until the end at the speed so far.
    pub fn remaining(&self) -> Option<Duration> {
        let left = self.tokens.saturating_sub(self.tokens_done) as f64;
        self.tokens_per_second().and_then(|speed| Duration::try_from_secs_f64(left / speed).ok())
    }
}

/// Passes a sweep on and reports how far it is: a wave of a large model takes minutes.
pub(crate) struct Within<'a, 'c> {
    pub inner: &'a mut Collection<'c>,
    pub shape: &'a MoeShape,
    /// Tokens that are run at the same time, those of other ranks included: the part of this wave stands for them.
    pub together: u64,
    /// Before the wave.
    pub from: Progress,
    pub start: Instant,
    /// Who wants to know.
    pub progress: Option<&'a mut dyn FnMut(&Progress)>,
}

/// The part of the work of a forward sweep, where a backward sweep follows: it recomputes and costs about twice as
/// much.
fn forward_part(needs: Signals) -> f64 {
    if needs.backward() { 1.0 / 3.0 } else { 1.0 }
}

/// The part of the MoE layers before this expert.
fn place(shape: &MoeShape, layer: usize, expert: usize) -> f64 {
    let place = shape.layers.partition_point(|moe| moe.layer < layer) as f64;
    let experts = shape.layer(layer).map_or(1, |l| l.num_experts()).max(1) as f64;
    (place + expert as f64 / experts) / shape.layers.len().max(1) as f64
}

/// The part of a wave that is done.
pub(crate) fn part_done(shape: &MoeShape, needs: Signals, done: SweepPart) -> f64 {
    let forward = forward_part(needs);
    match done {
        SweepPart::Forward(layer) => forward * place(shape, layer + 1, 0),
        SweepPart::Head => forward,
        SweepPart::Backward(layer) => forward + (1.0 - forward) * (1.0 - place(shape, layer, 0)),
    }
}

/// So many tokens are this part of them.
pub(crate) fn tokens_of(tokens: u64, part: f64) -> u64 {
    (part.clamp(0.0, 1.0) * tokens as f64) as u64
}

impl Within<'_, '_> {
    /// Reports that this part of the wave is done.
    fn at(&mut self, part: f64) {
        let mut at = self.from;
        // What an earlier run did of this wave is done from the start.
        at.tokens_done += tokens_of(self.together, part);
        at.elapsed = self.start.elapsed();
        if let Some(progress) = &mut self.progress {
            progress(&at);
        }
    }
}

impl Observer for Within<'_, '_> {
    fn needs(&self) -> Signals {
        self.inner.needs()
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.inner.begin_wave(wave)
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.at(forward_part(self.needs()) * place(self.shape, trace.layer, 0));
        self.inner.layer(trace)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let forward = forward_part(self.needs());
        let part = match trace.backward {
            None => forward * place(self.shape, trace.layer, trace.expert),
            Some(_) => {
                let layers = self.shape.layers.len().max(1) as f64;
                // Layers come from the last to the first, the experts of each in order.
                let back = place(self.shape, trace.layer, 0) + 1.0 / layers;
                let of_layer = place(self.shape, trace.layer, trace.expert) - place(self.shape, trace.layer, 0);
                forward + (1.0 - forward) * (1.0 - back + of_layer)
            }
        };
        self.at(part);
        self.inner.expert(trace)
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> moe_core::Result<()> {
        self.inner.router(gradients)
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> moe_core::Result<()> {
        self.inner.hidden(layer, hidden)
    }

    fn last_hidden(&mut self, hidden: &Tensor<2>) -> moe_core::Result<()> {
        self.inner.last_hidden(hidden)
    }

    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> moe_core::Result<()> {
        self.inner.logits(first, logits, vocab)
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        self.inner.output(output)
    }

    fn recall(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.inner.recall(trace)
    }

    fn done(&mut self, part: SweepPart) -> moe_core::Result<()> {
        self.inner.done(part)
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.inner.end_wave(wave)
    }
}
