//! Collecting statistics over the waves of a data set: resumable and shardable.

use std::collections::BTreeSet;

use moe_checkpoint::{Statistics, StatisticsStore};
use moe_core::data::Wave;
use moe_core::trace::{Observer, Signals};
use moe_core::{Engine, WaveReport};
use serde::Serialize;

use crate::statistics::StatisticId;
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
    /// Tokens of the waves finished.
    pub tokens_done: u64,
    /// Mean cross-entropy over the predicted tokens of the waves run so far, in nats, if it is known.
    pub loss: Option<f64>,
}

/// The recipe that a [`Provenance`](moe_checkpoint::Provenance) of statistics should carry, as one line of JSON: which
/// statistics, and how the data was cut into waves, since both decide what is in a wave's file. `data` is whatever
/// describes the latter, such as [`WaveOptions`](moe_core::data::WaveOptions) and the truncation length.
///
/// # Errors
/// [`Error::UnknownStatistic`]; [`Error::InvalidField`] if `data` is not JSON.
pub fn recipe(ids: &[StatisticId], data: &impl Serialize) -> Result<String> {
    let collectors = crate::collectors::collectors_for(ids)?;
    let statistics: BTreeSet<_> = collectors.iter().flat_map(|c| c.statistics()).map(|s| s.id.as_str()).collect();
    let data = serde_json::to_value(data).map_err(|error| Error::InvalidField {
        scorer: "recipe".into(),
        field: "data".into(),
        reason: error.to_string(),
    })?;
    Ok(serde_json::json!({ "statistics": statistics, "data": data }).to_string())
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
    collection: &mut Collection,
    waves: impl IntoIterator<Item = &'w Wave>,
    store: Option<&mut StatisticsStore>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Statistics> {
    if collection.needs() == Signals::NONE {
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
        loss: None,
    };
    tracing::debug!(waves = at.waves, resumed = at.waves_resumed, statistics = ?collection.ids(), "collecting");
    progress(&at);
    let (mut loss, mut predicted) = (Some(0.0), 0);
    for wave in waves {
        if sink.holds(wave.id) {
            continue;
        }
        let run = runner.run(wave, collection)?;
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
        at.loss = loss.filter(|_| predicted > 0).map(|sum| sum / predicted as f64);
        progress(&at);
    }
    sink.fold()
}

/// Where finished waves go.
enum Sink<'a> {
    Store(&'a mut StatisticsStore),
    Memory(Box<Statistics>),
}

impl<'a> Sink<'a> {
    fn new(collection: &Collection, store: Option<&'a mut StatisticsStore>) -> Result<Self> {
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
