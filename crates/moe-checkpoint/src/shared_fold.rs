//! The sum of waves that the ranks of a group have.

use crate::group::{Group, pack, unpack};
use crate::{MoeShape, Provenance, Result, Statistics, StatisticsSlice};

/// The sum of the statistics of waves of which the ranks of a group have some each. Every rank folds its
/// [slice](Statistics::slice) of the arrays of all waves, in their order, so that the sum has the bits of
/// [`Statistics::fold`] by one process, and takes an Nth of its memory until it is put together.
#[derive(Debug)]
pub struct SharedFold<'g> {
    group: &'g dyn Group,
    shape: MoeShape,
    provenance: Provenance,
    slice: StatisticsSlice,
}

impl<'g> SharedFold<'g> {
    /// Of no wave yet.
    pub fn new(group: &'g dyn Group, shape: &MoeShape, provenance: &Provenance) -> Self {
        let slice = StatisticsSlice::new(shape, provenance.clone());
        Self { group, shape: shape.clone(), provenance: provenance.clone(), slice }
    }

    /// Folds some waves in order, of which `from` says the rank that has each; `own` are those that this one has. All
    /// ranks make the same call. Values travel as f32, which those of a wave's file are.
    ///
    /// # Errors
    /// Those of [`Statistics::fold`]; what has stopped another rank.
    pub fn round(&mut self, from: &[usize], own: Vec<Statistics>) -> Result<()> {
        let size = self.group.size();
        if size == 1 {
            return own.into_iter().try_for_each(|wave| self.slice.fold(&wave.into()));
        }
        let mut to = Vec::with_capacity(size);
        for owner in 0..size {
            let slices: Vec<Vec<u8>> =
                own.iter().map(|wave| wave.slice(owner, size).to_message(false)).collect::<Result<_>>()?;
            to.push(pack(slices.iter().map(Vec::as_slice)));
        }
        drop(own);
        let received = self.group.exchange(to)?;
        let slices = received.iter().map(|packed| unpack(packed)).collect::<Result<Vec<_>>>()?;
        let mut next: Vec<_> = slices.into_iter().map(Vec::into_iter).collect();
        for rank in from {
            let message = next.get_mut(*rank).and_then(Iterator::next).unwrap_or_default();
            self.slice.fold(&StatisticsSlice::from_message(&self.shape, self.provenance.clone(), message)?)?;
        }
        Ok(())
    }

    /// All slices together, on every rank.
    ///
    /// # Errors
    /// What has stopped another rank.
    pub fn whole(self) -> Result<Statistics> {
        if self.group.size() == 1 {
            return StatisticsSlice::whole(vec![self.slice]);
        }
        let all = self.group.share(self.slice.to_message(true)?)?;
        let slices = all.iter().map(|m| StatisticsSlice::from_message(&self.shape, self.provenance.clone(), m));
        StatisticsSlice::whole(slices.collect::<Result<_>>()?)
    }
}
