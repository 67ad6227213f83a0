//! Where finished waves go, and how their sum is formed: by one process, or by the ranks of a group.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use moe_checkpoint::group::Group;
use moe_checkpoint::{SharedFold, Statistics, StatisticsStore};

use crate::{Collection, Result};

/// Finished waves: in a store, until all are there, or in their sum at once.
pub(crate) struct FinishedWaves<'a> {
    group: &'a dyn Group,
    to: To<'a>,
    /// The wave of this rank in the round, if it goes into the sum at once.
    own: Option<Statistics>,
}

enum To<'a> {
    Store(&'a mut StatisticsStore),
    Memory(Box<SharedFold<'a>>),
}

impl<'a> FinishedWaves<'a> {
    pub fn new(
        group: &'a dyn Group,
        collection: &Collection<'_>,
        store: Option<&'a mut StatisticsStore>,
    ) -> Result<Self> {
        let Some(store) = store else {
            let fold = SharedFold::new(group, collection.shape(), collection.provenance());
            return Ok(Self { group, to: To::Memory(Box::new(fold)), own: None });
        };
        // A fold finds all of this, but only after hours of running waves. Folding nothing checks provenance and shape;
        // the first wave shows the arrays.
        let mut first = match store.waves().first() {
            Some(wave) => store.load(*wave)?,
            None => Statistics::new(store.shape(), store.provenance().clone()),
        };
        first.fold(&collection.empty()?)?;
        Ok(Self { group, to: To::Store(store), own: None })
    }

    /// Where a run that is stopped within a wave leaves what it has.
    pub fn unfinished(&self, wave: u64) -> Option<PathBuf> {
        match &self.to {
            To::Store(store) => Some(store.unfinished(wave)),
            To::Memory(_) => None,
        }
    }

    /// Takes the wave of this rank.
    pub fn put(&mut self, mut wave: Statistics) -> Result<()> {
        match &mut self.to {
            To::Store(store) => store.write(&wave)?,
            To::Memory(_) => {
                // As a wave's file does, so that a collection without a store has the same bits.
                wave.round_to_f32();
                self.own = Some(wave);
            }
        }
        Ok(())
    }

    /// A round of so many waves, one by each of the first ranks, is over.
    pub fn end_round(&mut self, waves: usize) -> Result<()> {
        match &mut self.to {
            To::Store(_) => Ok(()),
            To::Memory(fold) => Ok(fold.round(&Vec::from_iter(0..waves), Vec::from_iter(self.own.take()))?),
        }
    }

    /// The sum of all waves.
    pub fn fold(self) -> Result<Statistics> {
        match self.to {
            To::Store(store) => fold_stores(self.group, store),
            To::Memory(fold) => Ok(fold.whole()?),
        }
    }
}

/// Who has which waves in its store.
pub(crate) fn held_by(group: &dyn Group, store: &StatisticsStore) -> Result<BTreeMap<u64, Vec<usize>>> {
    let own: BTreeSet<u64> = store.waves().clone();
    let all = group.share(own.iter().flat_map(|wave| wave.to_le_bytes()).collect())?;
    let mut held: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (rank, waves) in all.iter().enumerate() {
        for wave in waves.as_chunks::<8>().0 {
            held.entry(u64::from_le_bytes(*wave)).or_default().push(rank);
        }
    }
    Ok(held)
}

/// The sum of all waves that the ranks have in their stores, in ascending id, on every rank.
pub(crate) fn fold_stores(group: &dyn Group, store: &StatisticsStore) -> Result<Statistics> {
    if group.size() == 1 {
        return Ok(store.fold()?);
    }
    // Where several ranks have a wave, they take turns.
    let held = held_by(group, store)?;
    let providers: Vec<(u64, usize)> =
        held.iter().enumerate().map(|(turn, (wave, ranks))| (*wave, ranks[turn % ranks.len()])).collect();
    let mut fold = SharedFold::new(group, store.shape(), store.provenance());
    for round in providers.chunks(group.size()) {
        let own = round.iter().filter(|(_, rank)| *rank == group.rank());
        let own = own.map(|(wave, _)| Ok(store.load(*wave)?)).collect::<Result<Vec<_>>>()?;
        fold.round(&round.iter().map(|(_, rank)| *rank).collect::<Vec<_>>(), own)?;
    }
    Ok(fold.whole()?)
}
