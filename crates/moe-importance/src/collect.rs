//! Collecting statistics over the waves of a data set: resumable and shardable.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use moe_checkpoint::{MoeShape, Statistics, StatisticsStore};
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerOutput, LayerTrace, Observer, RouterGradients, Signals, SweepPart, WaveInfo};
use moe_core::{Engine, UnfinishedWave, WaveReport};

use crate::{Collection, Error, Result};

/// Runs a model over one wave, showing it to an observer: an [`Engine`], or any closure that does the same.
pub trait WaveRunner {
    /// Runs `wave` as far as `observer` needs it: from its `begin_wave` to its `end_wave`.
    ///
    /// # Errors
    /// Whatever stops the model.
    fn run(&mut self, wave: &Wave, observer: &mut dyn Observer) -> moe_core::Result<WaveReport>;

    /// Opens a directory for a wave that may be stopped and [gone on](Self::go_on) with; nothing from a runner that
    /// cannot, whose waves begin anew. As [`Engine::unfinished`].
    ///
    /// # Errors
    /// A directory that cannot be used.
    fn unfinished(
        &mut self,
        wave: &Wave,
        needs: Signals,
        directory: &Path,
        identity: &str,
    ) -> moe_core::Result<Option<UnfinishedWave>> {
        let _ = (wave, needs, directory, identity);
        Ok(None)
    }

    /// Goes on with a wave. As [`Engine::go_on`].
    ///
    /// # Errors
    /// Whatever stops the model.
    fn go_on(
        &mut self,
        wave: &Wave,
        observer: &mut dyn Observer,
        unfinished: &mut UnfinishedWave,
    ) -> moe_core::Result<WaveReport> {
        let _ = unfinished;
        self.run(wave, observer)
    }
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

    fn unfinished(
        &mut self,
        wave: &Wave,
        needs: Signals,
        directory: &Path,
        identity: &str,
    ) -> moe_core::Result<Option<UnfinishedWave>> {
        Engine::unfinished(self, wave, needs, directory, identity)
    }

    fn go_on(
        &mut self,
        wave: &Wave,
        observer: &mut dyn Observer,
        unfinished: &mut UnfinishedWave,
    ) -> moe_core::Result<WaveReport> {
        Engine::go_on(self, wave, observer, unfinished)
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

/// Runs every wave that `store` does not hold yet, writes each as soon as it is finished, and returns the fold of all
/// waves of the store.
///
/// Where the runner can (an [`Engine`] can, and all collectors of this crate), a wave that was stopped in its middle
/// goes on with the layer it was in: what is needed for that is kept beside the waves of the store, until the wave is
/// finished.
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
    let identity = format!("{:?}", collection.provenance());
    for wave in waves {
        if sink.holds(wave.id) {
            continue;
        }
        let mut unfinished = match sink.unfinished(wave.id).filter(|_| collection.goes_on()) {
            Some(directory) => runner.unfinished(wave, collection.needs(), &directory, &identity)?,
            None => None,
        };
        collection.keep_parts(unfinished.as_ref().map(|unfinished| unfinished.directory().to_path_buf()));
        let shape = collection.shape().clone();
        if let Some(unfinished) = &mut unfinished
            && let Some(done) = unfinished.done()
        {
            match collection.resume(unfinished.directory(), done, unfinished.layers()) {
                Ok(()) => at.tokens_resumed += tokens_of(wave, part_done(&shape, collection.needs(), done)),
                Err(error) => {
                    tracing::warn!("wave {}: begun anew: {error}", wave.id);
                    unfinished.restart()?;
                }
            }
        }
        let mut seen = Within {
            inner: collection,
            shape: &shape,
            wave,
            from: at,
            start,
            progress: if within { Some(&mut *progress) } else { None },
        };
        let run = match &mut unfinished {
            None => runner.run(wave, &mut seen)?,
            Some(unfinished) => runner.go_on(wave, &mut seen, unfinished)?,
        };
        let statistics =
            collection.take().filter(|s| s.waves().contains(&wave.id)).ok_or_else(|| Error::WaveOrder {
                what: "run of a wave",
                found: "no finished wave".into(),
                expected: format!("wave {}", wave.id),
            })?;
        sink.write(statistics)?;
        if let Some(unfinished) = unfinished {
            unfinished.remove()?;
        }
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
    /// Who wants to know.
    progress: Option<&'a mut dyn FnMut(&Progress)>,
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
fn part_done(shape: &MoeShape, needs: Signals, done: SweepPart) -> f64 {
    let forward = forward_part(needs);
    match done {
        SweepPart::Forward(layer) => forward * place(shape, layer + 1, 0),
        SweepPart::Head => forward,
        SweepPart::Backward(layer) => forward + (1.0 - forward) * (1.0 - place(shape, layer, 0)),
    }
}

/// So many tokens of a wave are its part.
fn tokens_of(wave: &Wave, part: f64) -> u64 {
    (part.clamp(0.0, 1.0) * wave.tokens() as f64) as u64
}

impl Within<'_, '_> {
    /// Reports that this part of the wave is done.
    fn at(&mut self, part: f64) {
        let mut at = self.from;
        // What an earlier run did of this wave is done from the start.
        at.tokens_done += tokens_of(self.wave, part);
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

    /// Where a run that is stopped within a wave leaves what it has.
    fn unfinished(&self, wave: u64) -> Option<PathBuf> {
        match self {
            Self::Store(store) => Some(store.unfinished(wave)),
            Self::Memory(_) => None,
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
