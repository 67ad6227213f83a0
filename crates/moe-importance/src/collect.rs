//! Collecting statistics over the waves of a data set: resumable, shardable, shared by a group of processes.

use std::path::Path;
use std::time::{Duration, Instant};

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{Statistics, StatisticsStore};
use moe_core::data::Wave;
use moe_core::trace::{Observer, Signals};
use moe_core::{Engine, UnfinishedWave, WaveReport};

use crate::finished_waves::{FinishedWaves, held_by};
use crate::progress::{Progress, Within, part_done, tokens_of};
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
    Collecting { runner, collection, progress, within: false, group: &Alone }.run(waves, store)
}

/// A collection at work.
pub(crate) struct Collecting<'a, 'c> {
    pub runner: &'a mut dyn WaveRunner,
    pub collection: &'a mut Collection<'c>,
    pub progress: &'a mut dyn FnMut(&Progress),
    /// Whether progress is reported within waves, too.
    pub within: bool,
    /// Who shares the waves.
    pub group: &'a dyn Group,
}

impl Collecting<'_, '_> {
    /// As [`collect`]; every rank of the group gets the same result. Waves that no rank has in its store are run in
    /// rounds, one by each rank; a rank that has none in the last round waits.
    pub fn run<'w>(
        mut self,
        waves: impl IntoIterator<Item = &'w Wave>,
        store: Option<&mut StatisticsStore>,
    ) -> Result<Statistics> {
        if self.collection.needs() == Signals::NONE && !self.collection.needs_forward() {
            return self.collection.empty();
        }
        let mut waves: Vec<&Wave> = waves.into_iter().collect();
        if waves.is_empty() {
            return Err(Error::NoData { what: "collection".into(), counted: "waves" });
        }
        waves.sort_by_key(|wave| wave.id);
        if let Some(pair) = waves.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(Error::DuplicateWave { id: pair[0].id });
        }
        let held = store.as_deref().map(|store| held_by(self.group, store)).transpose()?.unwrap_or_default();
        let mut finished = FinishedWaves::new(self.group, self.collection, store)?;
        let (done, left): (Vec<&Wave>, Vec<&Wave>) = waves.iter().partition(|wave| held.contains_key(&wave.id));
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
        let (waves, resumed) = (at.waves, at.waves_resumed);
        tracing::debug!(waves, resumed, statistics = ?self.collection.ids(), "collecting");
        (self.progress)(&at);
        let (mut loss, mut predicted) = (Some(0.0), 0);
        for round in left.chunks(self.group.size()) {
            let together = tokens(round);
            let own = round.get(self.group.rank());
            let own = own.map(|wave| self.wave(wave, together, &mut finished, &mut at, start)).transpose()?;
            finished.end_round(round.len())?;
            for (wave, of_wave) in round.iter().zip(losses(self.group, own.flatten())?) {
                loss = loss.zip(of_wave).map(|(sum, loss)| sum + loss);
                predicted += wave.loss_tokens();
            }
            at.waves_done += round.len();
            at.tokens_done += together;
            at.elapsed = start.elapsed();
            at.loss = loss.filter(|_| predicted > 0).map(|sum| sum / predicted as f64);
            (self.progress)(&at);
        }
        finished.fold()
    }

    /// Runs one wave, or what an earlier run has left of it; its loss, if it has one.
    fn wave(
        &mut self,
        wave: &Wave,
        together: u64,
        finished: &mut FinishedWaves<'_>,
        at: &mut Progress,
        start: Instant,
    ) -> Result<Option<f64>> {
        let collection = &mut *self.collection;
        let identity = format!("{:?}", collection.provenance());
        let mut unfinished = match finished.unfinished(wave.id).filter(|_| collection.goes_on()) {
            Some(directory) => self.runner.unfinished(wave, collection.needs(), &directory, &identity)?,
            None => None,
        };
        collection.keep_parts(unfinished.as_ref().map(|unfinished| unfinished.directory().to_path_buf()));
        let shape = collection.shape().clone();
        if let Some(unfinished) = &mut unfinished
            && let Some(done) = unfinished.done()
        {
            match collection.resume(unfinished.directory(), done, unfinished.layers()) {
                Ok(()) => at.tokens_resumed += tokens_of(together, part_done(&shape, collection.needs(), done)),
                Err(error) => {
                    tracing::warn!("wave {}: begun anew: {error}", wave.id);
                    unfinished.restart()?;
                }
            }
        }
        let progress: Option<&mut dyn FnMut(&Progress)> = match self.within {
            true => Some(&mut *self.progress),
            false => None,
        };
        let mut seen = Within { inner: collection, shape: &shape, together, from: *at, start, progress };
        let run = match &mut unfinished {
            None => self.runner.run(wave, &mut seen)?,
            Some(unfinished) => self.runner.go_on(wave, &mut seen, unfinished)?,
        };
        let statistics =
            collection.take().filter(|s| s.waves().contains(&wave.id)).ok_or_else(|| Error::WaveOrder {
                what: "run of a wave",
                found: "no finished wave".into(),
                expected: format!("wave {}", wave.id),
            })?;
        finished.put(statistics)?;
        if let Some(unfinished) = unfinished {
            unfinished.remove()?;
        }
        Ok(run.loss)
    }
}

fn tokens(waves: &[&Wave]) -> u64 {
    waves.iter().map(|wave| wave.tokens() as u64).sum()
}

/// The losses of a round, by rank; none where a rank ran no wave, or one without a loss.
fn losses(group: &dyn Group, own: Option<f64>) -> Result<Vec<Option<f64>>> {
    let own = own.map(|loss| loss.to_le_bytes().to_vec()).unwrap_or_default();
    let all = group.share(own)?;
    Ok(all.iter().map(|bytes| bytes.as_slice().try_into().ok().map(f64::from_le_bytes)).collect())
}
