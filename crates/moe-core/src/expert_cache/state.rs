//! What is in a cache of experts, and which goes.

use std::collections::BTreeMap;

use super::{EvictionPolicy, ExpertCacheStatistics};

/// The precision of a copy of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Precision {
    /// That of the model.
    High,
    /// The second one.
    Low,
}

/// A copy of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExpertKey {
    /// Position of its layer among the MoE layers.
    pub layer: usize,
    /// Its number.
    pub expert: usize,
    /// Its precision.
    pub precision: Precision,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    bytes: u64,
    pinned: bool,
    ahead: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    last: u64,
    all: u64,
    high: u64,
}

/// A cache of experts without the reading: holds no more than its bytes, and evicts nothing that is pinned.
#[derive(Debug)]
pub struct CacheState<V> {
    capacity: u64,
    policy: EvictionPolicy,
    layers: usize,
    used: u64,
    clock: u64,
    step: u64,
    layer: usize,
    entries: BTreeMap<ExpertKey, Entry<V>>,
    uses: BTreeMap<(usize, usize), Uses>,
    recency: BTreeMap<ExpertKey, u64>,
    statistics: ExpertCacheStatistics,
}

impl<V: Clone> CacheState<V> {
    /// An empty cache of so many bytes for a model of so many MoE layers.
    pub fn new(capacity: u64, policy: EvictionPolicy, layers: usize) -> Self {
        Self {
            capacity,
            policy,
            layers: layers.max(1),
            used: 0,
            clock: 0,
            step: 0,
            layer: 0,
            entries: BTreeMap::new(),
            uses: BTreeMap::new(),
            recency: BTreeMap::new(),
            statistics: ExpertCacheStatistics::default(),
        }
    }

    /// What happened so far.
    pub fn statistics(&self) -> ExpertCacheStatistics {
        self.statistics
    }

    /// Bytes that are held.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// A layer begins to run: the first one begins a step.
    pub fn begin_layer(&mut self, layer: usize) {
        self.step += u64::from(layer == 0 || self.step == 0);
        self.layer = layer;
        // What was loaded ahead for this layer may go once it has been used.
        self.entries.iter_mut().filter(|(key, _)| key.layer < layer).for_each(|(_, entry)| entry.pinned = false);
    }

    /// So many choices of tokens were left out.
    pub fn count_skipped(&mut self, choices: u64) {
        self.statistics.skipped += choices;
    }

    /// The copy that serves an expert in this precision, if there is one: one in high precision serves both. Counts the
    /// use, and a hit or a miss.
    pub fn get(&mut self, layer: usize, expert: usize, precision: Precision) -> Option<V> {
        self.clock += 1;
        let uses = self.uses.entry((layer, expert)).or_default();
        (uses.last, uses.all) = (self.step, uses.all + 1);
        uses.high += u64::from(precision == Precision::High);
        for copy in [Precision::High, precision] {
            let key = ExpertKey { layer, expert, precision: copy };
            if let Some(entry) = self.entries.get_mut(&key) {
                self.recency.insert(key, self.clock);
                self.statistics.hits += 1;
                self.statistics.prefetched_used += u64::from(std::mem::take(&mut entry.ahead));
                entry.pinned = false;
                return Some(entry.value.clone());
            }
        }
        self.statistics.misses[usize::from(precision == Precision::Low)] += 1;
        None
    }

    /// Whether a copy in this or a higher precision is there.
    pub fn contains(&self, layer: usize, expert: usize, precision: Precision) -> bool {
        [Precision::High, precision]
            .iter()
            .any(|copy| self.entries.contains_key(&ExpertKey { layer, expert, precision: *copy }))
    }

    /// Puts a copy that was read in; `ahead` for one that nobody has asked for yet, which stays until its layer has
    /// run. Whether there was a place for it: one that is larger than what may be evicted is not kept.
    pub fn put(&mut self, key: ExpertKey, value: V, bytes: u64, ahead: bool) -> bool {
        self.statistics.bytes_read += bytes;
        self.statistics.prefetched += u64::from(ahead);
        if self.entries.contains_key(&key) {
            return true;
        }
        while self.used + bytes > self.capacity {
            let candidates = self.entries.iter().filter(|(_, entry)| !entry.pinned);
            let worst = candidates.map(|(key, _)| (self.worth(key), *key));
            let Some((_, worst)) = worst.min_by(|(a, x), (b, y)| a.total_cmp(b).then(x.cmp(y))) else { return false };
            if let Some(entry) = self.entries.remove(&worst) {
                self.used -= entry.bytes;
            }
            self.recency.remove(&worst);
        }
        self.clock += 1;
        self.used += bytes;
        self.statistics.peak_bytes = self.statistics.peak_bytes.max(self.used);
        self.recency.insert(key, self.clock);
        self.entries.insert(key, Entry { value, bytes, pinned: ahead, ahead });
        true
    }

    /// The one of least worth goes.
    fn worth(&self, key: &ExpertKey) -> f64 {
        let uses = self.uses.get(&(key.layer, key.expert)).copied().unwrap_or_default();
        let ahead = (key.layer + self.layers - self.layer % self.layers) % self.layers;
        match self.policy {
            EvictionPolicy::Lru => self.recency.get(key).copied().unwrap_or(0) as f64,
            EvictionPolicy::Priority { weights } => {
                let step = self.step.max(1) as f64;
                let parts = [
                    uses.last as f64 / step,
                    uses.all as f64 / step,
                    uses.high as f64 / step,
                    1.0 - ahead as f64 / self.layers as f64,
                ];
                parts.iter().zip(weights).map(|(part, weight)| part * f64::from(weight)).sum()
            }
            EvictionPolicy::Distance => {
                let ahead = if ahead == 0 { self.layers } else { ahead };
                uses.all as f64 / ahead as f64
            }
        }
    }
}
