//! Collecting statistics over the waves of a data set: resumable and shardable.

use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use moe_checkpoint::{MoeShape, Statistics, StatisticsStore};
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, RouterGradients, Signals, WaveInfo};
use moe_core::{Engine, WaveReport};

use crate::{Collection, Error, Result};

/// Runs a model over one wave, showing it to an observer: an [`Engine`], or any closure that does the same.
pub trait WaveRunner {
    /// Runs `wave` as far as `observer` needs it: from its `begin_wave` to its `end_wave`.
    ///
    /// # Errors
    /// Whatever stops the model.
    fn run(&mut self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<WaveReport>;
}

impl<F: FnMut(&Wave, &mut dyn Observer) -> moe_core::Result<WaveReport>> WaveRunner for F {
    fn run(&mut self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<WaveReport> {
        self(wave, observer)
    }
}

impl WaveRunner for Engine<'_> {
    fn run(&mut self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<WaveReport> {
        Engine::run(self, wave, observer)
    }
}

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
    /// Tokens of the waves that earlier runs finished.
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

/// Runs every wave that `store` does not hold yet, writes each as soon as it is finished, and returns the fold of all
/// waves of the store.
///
/// The result depends on the waves alone, to the last bit: not on how often the collection was interrupted, nor on how
/// many processes shared the waves and had their stores [absorbed](StatisticsStore::absorb), nor on there being a
/// store. Without one, an interrupted collection starts again.
///
/// If nothing needs to be seen (no statistics are asked for), the model is not run and the result is empty.
///
/// `progress` is called before the first wave and after every wave.
///
/// # Errors
/// [`Error::NoData`] for no waves, [`Error::DuplicateWave`], a store of another model, data, recipe or set of
/// statistics: all before the model is run. Then whatever stops the model, and files that cannot be written.
pub fn collect<'w>(
    runner: &mut dyn WaveRunner,
    collection: &mut Collection<'_>,
    waves: impl IntoIterator<Item = &'w Wave>,
    store: Option<&mut StatisticsStore>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Statistics> {
    collect_reporting(runner, collection, waves, store, progress, false)
}

/// As [`collect`]; also reports `within` waves, if wanted.
pub(crate) fn collect_reporting<'w>(
    runner: &mut dyn WaveRunner,
    collection: &mut Collection<'_>,
    waves: impl IntoIterator<Item = &'w Wave>,
    store: Option<&mut StatisticsStore>,
    progress: &mut dyn FnMut(&Progress),
    within: bool,
) -> Result<Statistics> {
    if collection.needs() == Signals::NONE && !collection.needs_forward() {
        return collection.empty();
    }
    let mut waves: Vec<&Wave> = waves.into_iter().collect();
    if waves.is_empty() {
        return Err(Error::NoData { what: "collection".into(), counted: "waves" });
    }
    waves.sort_by_key(|wave| wave.id);
    if let Some(pair) = waves.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(Error::DuplicateWave { id: pair[0].id });
    }
    let mut sink = Sink::new(collection, store)?;

    let done: Vec<&Wave> = waves.iter().copied().filter(|wave| sink.holds(wave.id)).collect();
    let tokens = |waves: &[&Wave]| waves.iter().map(|wave| wave.tokens() as u64).sum();
    let mut at = Progress {
        waves: waves.len(),
        waves_done: done.len(),
        waves_resumed: done.len(),
        tokens: tokens(&waves),
        tokens_done: tokens(&done),
        tokens_resumed: tokens(&done),
        elapsed: Duration::ZERO,
        loss: None,
    };
    let start = Instant::now();
    tracing::debug!(waves = at.waves, resumed = at.waves_resumed, statistics = ?collection.ids(), "collecting");
    progress(&at);
    let (mut loss, mut predicted) = (Some(0.0), 0);
    for wave in waves {
        if sink.holds(wave.id) {
            continue;
        }
        let run = match within {
            false => runner.run(wave, collection)?,
            true => {
                let shape = collection.shape().clone();
                let mut at =
                    Within { inner: collection, shape: &shape, wave, from: at, start, progress: &mut *progress };
                runner.run(wave, &mut at)?
            }
        };
        let statistics =
            collection.take().filter(|s| s.waves().contains(&wave.id)).ok_or_else(|| Error::WaveOrder {
                what: "run of a wave",
                found: "no finished wave".into(),
                expected: format!("wave {}", wave.id),
            })?;
        sink.write(statistics)?;
        loss = loss.zip(run.loss).map(|(sum, loss)| sum + loss);
        predicted += wave.loss_tokens();
        at.waves_done += 1;
        at.tokens_done += wave.tokens() as u64;
        at.elapsed = start.elapsed();
        at.loss = loss.filter(|_| predicted > 0).map(|sum| sum / predicted as f64);
        progress(&at);
    }
    sink.fold()
}

/// Passes a sweep on and reports how far it is: a wave of a large model takes minutes.
struct Within<'a, 'c> {
    inner: &'a mut Collection<'c>,
    shape: &'a MoeShape,
    wave: &'a Wave,
    /// Before the wave.
    from: Progress,
    start: Instant,
    progress: &'a mut dyn FnMut(&Progress),
}

impl Within<'_, '_> {
    /// The part of the work of a forward sweep, where a backward sweep follows: it recomputes and costs about twice as much.
    fn forward(&self) -> f64 {
        if self.inner.needs().backward() { 1.0 / 3.0 } else { 1.0 }
    }

    /// Reports that this part of the wave is done.
    fn at(&mut self, part: f64) {
        let mut at = self.from;
        at.tokens_done += (part.clamp(0.0, 1.0) * self.wave.tokens() as f64) as u64;
        at.elapsed = self.start.elapsed();
        (self.progress)(&at);
    }

    /// The part of the MoE layers before this one.
    fn place(&self, layer: usize, expert: usize) -> f64 {
        let place = self.shape.position(layer).unwrap_or_default() as f64;
        let experts = self.shape.layer(layer).map_or(1, |l| l.num_experts()).max(1) as f64;
        (place + expert as f64 / experts) / self.shape.layers.len().max(1) as f64
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
        let part = self.forward() * self.place(trace.layer, 0);
        self.at(part);
        self.inner.layer(trace)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let forward = self.forward();
        let part = match trace.backward {
            None => forward * self.place(trace.layer, trace.expert),
            Some(_) => {
                let layers = self.shape.layers.len().max(1) as f64;
                // Layers come from the last to the first, the experts of each in order.
                let back = self.place(trace.layer, 0) + 1.0 / layers;
                let of_layer = self.place(trace.layer, trace.expert) - self.place(trace.layer, 0);
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

    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> moe_core::Result<()> {
        self.inner.logits(first, logits, vocab)
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.inner.end_wave(wave)
    }
}

/// Where finished waves go.
enum Sink<'a> {
    Store(&'a mut StatisticsStore),
    Memory(Box<Statistics>),
}

impl<'a> Sink<'a> {
    fn new(collection: &Collection<'_>, store: Option<&'a mut StatisticsStore>) -> Result<Self> {
        let Some(store) = store else {
            return Ok(Self::Memory(Box::new(Statistics::new(collection.shape(), collection.provenance().clone()))));
        };
        // A fold finds all of this, but only after hours of running waves. Folding nothing checks provenance and shape;
        // the first wave shows the arrays.
        let mut first = match store.waves().first() {
            Some(wave) => store.load(*wave)?,
            None => Statistics::new(store.shape(), store.provenance().clone()),
        };
        first.fold(&collection.empty()?)?;
        Ok(Self::Store(store))
    }

    fn holds(&self, wave: u64) -> bool {
        match self {
            Self::Store(store) => store.waves().contains(&wave),
            Self::Memory(_) => false,
        }
    }

    fn write(&mut self, mut wave: Statistics) -> Result<()> {
        match self {
            Self::Store(store) => store.write(&wave)?,
            Self::Memory(folded) => {
                // As a wave's file does, so that a collection without a store has the same bits.
                wave.round_to_f32();
                folded.fold(&wave)?;
            }
        }
        Ok(())
    }

    fn fold(self) -> Result<Statistics> {
        match self {
            Self::Store(store) => Ok(store.fold()?),
            Self::Memory(folded) => Ok(*folded),
        }
    }
}
