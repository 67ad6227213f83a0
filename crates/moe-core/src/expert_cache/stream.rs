//! Reading experts through a cache.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use moe_checkpoint::{Checkpoint, ExpertWeights, StoredExpert};

use super::{CacheState, ExpertCacheOptions, ExpertCacheStatistics, ExpertKey, ExpertLevel, Precision, expert_levels};
use crate::error::Result;
use crate::router::Routed;

/// The experts of a model, read through a cache.
pub(crate) struct ExpertStream {
    shared: Arc<Shared>,
    options: ExpertCacheOptions,
    /// Sends experts to the thread that loads ahead.
    ahead: Option<Mutex<Sender<ExpertKey>>>,
}

struct Shared {
    high: Arc<Checkpoint>,
    low: Option<Arc<Checkpoint>>,
    /// MoE layers in order.
    layers: Vec<usize>,
    state: Mutex<State>,
    loaded: Condvar,
}

struct State {
    cache: CacheState<Arc<StoredExpert>>,
    /// Precision that the experts of a layer are needed in.
    needed: BTreeMap<(usize, usize), Precision>,
    /// What is being read.
    reading: BTreeSet<ExpertKey>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn checkpoint(&self, precision: Precision) -> &Arc<Checkpoint> {
        match precision {
            Precision::High => &self.high,
            Precision::Low => self.low.as_ref().unwrap_or(&self.high),
        }
    }

    /// Reads an expert and puts it in; other threads that want it wait.
    fn load(&self, key: ExpertKey, ahead: bool) -> Result<Arc<StoredExpert>> {
        let read = self.checkpoint(key.precision).stored_expert(self.layers[key.layer], key.expert);
        let mut state = self.lock();
        state.reading.remove(&key);
        self.loaded.notify_all();
        let stored = Arc::new(read?);
        state.cache.put(key, stored.clone(), stored.bytes(), ahead);
        Ok(stored)
    }
}

impl ExpertStream {
    pub fn new(high: &Arc<Checkpoint>, options: ExpertCacheOptions) -> Self {
        let layers: Vec<usize> = high.shape().layers.iter().map(|layer| layer.layer).collect();
        let cache = CacheState::new(options.bytes, options.policy, layers.len());
        let state = State { cache, needed: BTreeMap::new(), reading: BTreeSet::new() };
        let shared = Arc::new(Shared {
            high: high.clone(),
            low: options.low.as_ref().map(|low| low.model.clone()),
            layers,
            state: Mutex::new(state),
            loaded: Condvar::new(),
        });
        let ahead = options.prefetch.then(|| {
            let (send, receive) = channel::<ExpertKey>();
            let shared = shared.clone();
            // Ends when the stream, which has the sender, is dropped.
            std::thread::spawn(move || {
                for key in receive {
                    // What cannot be read is told when it is asked for.
                    let _ = shared.load(key, true);
                }
            });
            Mutex::new(send)
        });
        Self { shared, options, ahead }
    }

    pub fn options(&self) -> &ExpertCacheOptions {
        &self.options
    }

    pub fn statistics(&self) -> ExpertCacheStatistics {
        self.shared.lock().cache.statistics()
    }

    /// Position of a layer among the MoE layers.
    fn position(&self, layer: usize) -> usize {
        self.shared.layers.iter().position(|found| *found == layer).unwrap_or(0)
    }

    /// The MoE layer after this one; the first one after the last.
    pub fn next_layer(&self, layer: usize) -> Option<usize> {
        let next = (self.position(layer) + 1) % self.shared.layers.len().max(1);
        self.shared.layers.get(next).copied().filter(|next| *next > layer)
    }

    /// What every choice of every token is, `[tokens, k]`.
    fn levels(&self, routed: &Routed) -> Vec<ExpertLevel> {
        let high = self.options.low.as_ref().map_or(f32::INFINITY, |low| low.threshold);
        let skip = self.options.skip.unwrap_or(f32::INFINITY);
        // Without a second precision whoever is not skipped is high.
        let high = high.min(skip);
        let width = routed.top_k.max(1);
        routed.weights.chunks(width).flat_map(|scores| expert_levels(scores, high, skip)).collect()
    }

    /// Precision that each expert is needed in: high if any token needs it so.
    fn needs(routed: &Routed, levels: &[ExpertLevel]) -> BTreeMap<usize, Precision> {
        let mut needs = BTreeMap::new();
        for (expert, level) in routed.selected.iter().zip(levels) {
            let ExpertLevel::Runs(precision) = level else { continue };
            let needed = needs.entry(*expert as usize).or_insert(Precision::Low);
            *needed = (*needed).min(*precision);
        }
        needs
    }

    /// A layer is about to run with this routing. Which choices `[tokens, k]` are to be left out.
    pub fn begin_layer(&self, layer: usize, routed: &Routed) -> Vec<bool> {
        let levels = self.levels(routed);
        let (layer, needs) = (self.position(layer), Self::needs(routed, &levels));
        let skipped: Vec<bool> = levels.iter().map(|level| *level == ExpertLevel::Skipped).collect();
        let mut state = self.shared.lock();
        state.cache.begin_layer(layer);
        state.cache.count_skipped(skipped.iter().filter(|skipped| **skipped).count() as u64);
        state.needed.retain(|(other, _), _| *other != layer);
        state.needed.extend(needs.into_iter().map(|(expert, precision)| ((layer, expert), precision)));
        skipped
    }

    /// Begins to load what a layer that is still to come would be routed to.
    pub fn prefetch(&self, layer: usize, routed: &Routed) {
        let Some(ahead) = &self.ahead else { return };
        let (layer, needs) = (self.position(layer), Self::needs(routed, &self.levels(routed)));
        let mut state = self.shared.lock();
        for (expert, precision) in needs {
            let key = ExpertKey { layer, expert, precision };
            if state.cache.contains(layer, expert, precision) || !state.reading.insert(key) {
                continue;
            }
            if ahead.lock().unwrap_or_else(PoisonError::into_inner).send(key).is_err() {
                state.reading.remove(&key);
            }
        }
    }

    /// The weights of an expert, from memory or from disk.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        let position = self.position(layer);
        let mut state = self.shared.lock();
        let precision = state.needed.get(&(position, expert)).copied().unwrap_or(Precision::High);
        let key = ExpertKey { layer: position, expert, precision };
        let high = ExpertKey { precision: Precision::High, ..key };
        while state.reading.contains(&key) || state.reading.contains(&high) {
            state = self.shared.loaded.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let copy = if state.cache.contains(position, expert, Precision::High) { Precision::High } else { precision };
        let found = state.cache.get(position, expert, precision);
        let stored = match found {
            Some(stored) => {
                drop(state);
                stored
            }
            None => {
                state.reading.insert(key);
                drop(state);
                self.shared.load(key, false)?
            }
        };
        Ok(self.shared.checkpoint(copy).decode_expert(layer, expert, &stored)?)
    }
}
