//! Processes that do one job together.
//!
//! Whoever shares work out writes it once, against [`Group`]: [`Alone`] is a group of one, [`Threads`] are a group
//! inside one process, and with feature `mpi` `Mpi` is the group that a launcher such as `mpirun` or `srun` started.
//! What is exchanged is bytes; what is done with them, and in which order numbers are added, is up to the caller, and
//! by convention never depends on how many there are.

mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod threads;

use std::fmt;

use crate::{Error, Result};

pub use launcher::{Launch, launched, start};
#[cfg(feature = "mpi")]
#[cfg_attr(docsrs, doc(cfg(feature = "mpi")))]
pub use mpi::Mpi;
pub use threads::Threads;

/// Processes, or threads, that do one job together. Each has a rank, from 0.
///
/// All ranks make the same calls in the same order; a call returns when all have made it. A failure on one rank stops
/// all of them: it is told by [`agree`](#method.agree), and every call that another rank is in, or makes later, returns
/// [`Error::Rank`] with its message. So whoever runs ranks ends with one `agree` of the whole result, and every `?` on
/// the way is covered.
///
/// ```
/// use moe_checkpoint::{Result, group::{Group, Threads}};
///
/// let sums = Threads::run(3, |group| -> Result<u8> {
///     // to every rank its own number, times ten
///     let to = vec![vec![10 * group.rank() as u8]; group.size()];
///     Ok(group.exchange(to)?.concat().iter().sum())
/// });
/// assert_eq!(sums.into_iter().collect::<Result<Vec<u8>>>()?, [30, 30, 30]);
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
pub trait Group: fmt::Debug + Send + Sync {
    /// The place of this process, from 0.
    fn rank(&self) -> usize;

    /// How many there are, at least 1.
    fn size(&self) -> usize;

    /// All to all: `to[r]` goes to rank r, and what rank r sent here is the r-th of what comes back. Lengths are free.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank has failed; [`Error::Group`] for another number of messages than there are ranks, and
    /// for ranks that make different calls.
    fn exchange(&self, to: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>>;

    /// Waits for all ranks, and tells them of a failure of this one, if there is one.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank has failed, this one included.
    fn check(&self, failure: Option<&str>) -> Result<()>;

    /// The rank whose failure has stopped the group.
    fn failed(&self) -> Option<usize>;

    /// What every rank has, in order, at rank `root`; nothing at the others.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn gather(&self, root: usize, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let mut to = vec![Vec::new(); self.size()];
        *self.place(&mut to, root)? = bytes;
        let all = self.exchange(to)?;
        Ok(if self.rank() == root { all } else { Vec::new() })
    }

    /// What rank `root` has, at every rank. What others give is dropped.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn broadcast(&self, root: usize, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let to = if self.rank() == root { vec![bytes; self.size()] } else { vec![Vec::new(); self.size()] };
        Ok(std::mem::take(self.place(&mut self.exchange(to)?, root)?))
    }

    /// The message of rank `root` among those of all.
    ///
    /// # Errors
    /// [`Error::Group`] for a rank that there is not.
    #[doc(hidden)]
    fn place<'a>(&self, messages: &'a mut [Vec<u8>], root: usize) -> Result<&'a mut Vec<u8>> {
        let size = self.size();
        messages.get_mut(root).ok_or_else(|| Error::Group(format!("found rank {root}, expected one below {size}")))
    }
}

impl dyn Group + '_ {
    /// Ends a piece of work that all ranks did: what it gave, if it went well on all of them. Where it failed, its own
    /// error; elsewhere, the message of the rank that failed.
    ///
    /// # Errors
    /// That of `result`, else [`Error::Rank`].
    pub fn agree<T, E: From<Error> + fmt::Display>(&self, result: Result<T, E>) -> Result<T, E> {
        match result {
            Ok(value) => Ok(self.check(None).map(|()| value)?),
            Err(error) => {
                // Known here already; where this is what others have told, nothing is said again.
                self.check(Some(&error.to_string())).ok();
                Err(error)
            }
        }
    }

    /// What every rank has, in order, at every rank.
    ///
    /// # Errors
    /// As [`Group::exchange`].
    pub fn share(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.exchange(vec![bytes; self.size()])
    }

    /// What each of `items` gave, in their order, at every rank, where rank r did the items r, r + N, … and has what
    /// these gave in `own`.
    ///
    /// # Errors
    /// As [`Group::exchange`]; [`Error::Group`] for a rank that has done another number of them.
    pub fn share_dealt(&self, own: Vec<Vec<u8>>, items: usize) -> Result<Vec<Vec<u8>>> {
        let all = match self.size() {
            1 => vec![own],
            _ => {
                let all = self.share(pack(own.iter().map(Vec::as_slice)))?;
                let all = all.iter().map(|packed| Ok(unpack(packed)?.into_iter().map(<[u8]>::to_vec).collect()));
                all.collect::<Result<Vec<Vec<Vec<u8>>>>>()?
            }
        };
        for (rank, done) in all.iter().enumerate() {
            let expected = items.saturating_sub(rank).div_ceil(self.size());
            if done.len() != expected {
                let found = done.len();
                return Err(Error::Group(format!(
                    "found {found} of {items} items done by rank {rank}, expected {expected}"
                )));
            }
        }
        let mut all: Vec<_> = all.into_iter().map(Vec::into_iter).collect();
        let size = all.len();
        Ok((0..items).filter_map(|item| all[item % size].next()).collect())
    }

    /// Checks that all ranks have the same of something that has to be one.
    ///
    /// # Errors
    /// [`Error::Group`] on every rank, with what rank 0 and the first that differs have.
    pub fn same(&self, what: &str, value: &str) -> Result<()> {
        let all = self.share(value.as_bytes().to_vec())?;
        match all.iter().position(|other| *other != all[0]) {
            None => Ok(()),
            Some(rank) => {
                let [first, other] = [0, rank].map(|rank| String::from_utf8_lossy(&all[rank]).into_owned());
                Err(Error::Group(format!("{what}: found {other} on rank {rank}, expected that of rank 0, {first}")))
            }
        }
    }
}

/// A group of one: nothing is exchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn exchange(&self, to: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        expect_messages(self, &to)?;
        Ok(to)
    }

    fn check(&self, _: Option<&str>) -> Result<()> {
        Ok(())
    }

    fn failed(&self) -> Option<usize> {
        None
    }
}

/// Several messages as one.
pub fn pack<'a>(messages: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut packed = Vec::new();
    for message in messages {
        packed.extend((message.len() as u64).to_le_bytes());
        packed.extend(message);
    }
    packed
}

/// The messages of [`pack`], in order.
///
/// # Errors
/// [`Error::Group`] for bytes that are none.
pub fn unpack(mut packed: &[u8]) -> Result<Vec<&[u8]>> {
    let short = || Error::Group("a message of another rank ends early".into());
    let mut messages = Vec::new();
    while !packed.is_empty() {
        let (len, rest) = packed.split_first_chunk::<8>().ok_or_else(short)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| short())?;
        let (message, rest) = rest.split_at_checked(len).ok_or_else(short)?;
        messages.push(message);
        packed = rest;
    }
    Ok(messages)
}

fn expect_messages(group: &dyn Group, to: &[Vec<u8>]) -> Result<()> {
    match (to.len(), group.size()) {
        (found, expected) if found == expected => Ok(()),
        (found, expected) => Err(Error::Group(format!("found {found} messages, expected one to each of {expected}"))),
    }
}

#[cfg(test)]
mod tests;
