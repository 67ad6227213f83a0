//! The group that an MPI launcher started.

use std::sync::{Mutex, MutexGuard, PoisonError};

use mpi::collective::{CommunicatorCollectives, Root};
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::{Count, Threading};

use super::{Group, expect_messages};
use crate::{Error, Result};

/// Bytes that one call of MPI moves, at most: it counts in 32 bits, the places of a buffer included.
const MOST: usize = 1 << 30;

/// All processes of an MPI job: `MPI_COMM_WORLD`.
///
/// Every call begins with a few numbers from all to all: which call it is, whether a rank has failed, and how much it
/// sends. So a failure reaches the others in whatever call they are. MPI is finalized when this is dropped, for which
/// all ranks wait; a rank that dies instead is killed with the others by the launcher.
pub struct Mpi {
    rank: usize,
    size: usize,
    failure: Mutex<Option<(usize, String)>>,
    /// One call at a time; MPI lives as long as this.
    universe: Mutex<Universe>,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Check,
    Exchange,
    Broadcast,
}

impl Mpi {
    /// Initializes MPI.
    ///
    /// # Errors
    /// [`Error::Group`] if it is initialized already, or does not let calls come from several threads, one at a time.
    pub fn start() -> Result<Self> {
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| Error::Group("MPI is initialized already".into()))?;
        if threading < Threading::Serialized {
            return Err(Error::Group(format!(
                "MPI offers {threading:?}, expected calls from any thread, one at a time"
            )));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        Ok(Self { rank, size, failure: Mutex::new(None), universe: Mutex::new(universe) })
    }

    fn failure(&self) -> MutexGuard<'_, Option<(usize, String)>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails here and on all ranks that know the same.
    fn stop(&self, rank: usize, message: String) -> Error {
        *self.failure() = Some((rank, message.clone()));
        Error::Rank { rank, message }
    }

    /// Begins a call: what every rank sends at most, in bytes.
    fn begin(&self, world: &SimpleCommunicator, call: Call, bytes: usize, failure: Option<&str>) -> Result<Vec<usize>> {
        if let Some((rank, message)) = self.failure().clone() {
            return Err(Error::Rank { rank, message });
        }
        let mine = [call as u64, u64::from(failure.is_some()), failure.map_or(bytes, str::len) as u64];
        let mut all = vec![0u64; 3 * self.size];
        world.all_gather_into(&mine[..], &mut all[..]);
        let all: Vec<[u64; 3]> = all.chunks_exact(3).map(|of| [of[0], of[1], of[2]]).collect();
        if let Some(rank) = all.iter().position(|of| of[1] != 0) {
            let mut message = match failure {
                Some(failure) if rank == self.rank => failure.as_bytes().to_vec(),
                _ => vec![0; all[rank][2] as usize],
            };
            if !message.is_empty() {
                world.process_at_rank(rank as i32).broadcast_into(&mut message[..]);
            }
            return Err(self.stop(rank, String::from_utf8_lossy(&message).into_owned()));
        }
        if let Some(rank) = all.iter().position(|of| of[0] != all[0][0]) {
            let message = format!("makes call {} while rank 0 makes call {}", all[rank][0], all[0][0]);
            return Err(self.stop(rank, message));
        }
        Ok(all.into_iter().map(|of| of[2] as usize).collect())
    }

    fn world<T>(&self, call: impl FnOnce(&SimpleCommunicator) -> T) -> T {
        let universe = self.universe.lock().unwrap_or_else(PoisonError::into_inner);
        call(&universe.world())
    }
}

/// Counts of a buffer in a row, and where each begins.
fn places(counts: &[Count]) -> Vec<Count> {
    let starts = counts.iter().scan(0, |at, count| Some(std::mem::replace(at, *at + count)));
    starts.collect()
}

impl Group for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, mut to: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        expect_messages(self, &to)?;
        self.world(|world| {
            let longest = to.iter().map(Vec::len).max().unwrap_or(0);
            let longest = self.begin(world, Call::Exchange, longest, None)?.into_iter().max().unwrap_or(0);
            let sent: Vec<u64> = to.iter().map(|message| message.len() as u64).collect();
            let mut expected = vec![0u64; self.size];
            world.all_to_all_into(&sent[..], &mut expected[..]);
            let mut received: Vec<Vec<u8>> = expected.iter().map(|len| Vec::with_capacity(*len as usize)).collect();
            let piece = (MOST / self.size).max(1);
            for from in (0..longest).step_by(piece) {
                let count = |len: usize| len.saturating_sub(from).min(piece) as Count;
                let counts: Vec<Count> = sent.iter().map(|len| count(*len as usize)).collect();
                let coming: Vec<Count> = expected.iter().map(|len| count(*len as usize)).collect();
                let pieces = to.iter().zip(&counts).map(|(message, count)| match count {
                    0 => &[][..],
                    count => &message[from..from + *count as usize],
                });
                // One byte more than is sent: where a buffer of no bytes begins, Open MPI reads MPI_IN_PLACE.
                let out = pieces.chain([&[0][..]]).collect::<Vec<_>>().concat();
                if longest <= piece {
                    to.iter_mut().for_each(|message| *message = Vec::new());
                }
                let mut into = vec![0u8; 1 + coming.iter().map(|count| *count as usize).sum::<usize>()];
                let (starts, into_starts) = (places(&counts), places(&coming));
                world.all_to_all_varcount_into(
                    &Partition::new(&out[..], counts, starts),
                    &mut PartitionMut::new(&mut into[..], &coming[..], &into_starts[..]),
                );
                for ((message, start), count) in received.iter_mut().zip(&into_starts).zip(&coming) {
                    message.extend_from_slice(&into[*start as usize..(*start + *count) as usize]);
                }
            }
            Ok(received)
        })
    }

    fn broadcast(&self, root: usize, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
        if root >= self.size {
            return Err(Error::Group(format!("found rank {root}, expected one below {}", self.size)));
        }
        self.world(|world| {
            let lengths = self.begin(world, Call::Broadcast, bytes.len(), None)?;
            if self.rank != root {
                bytes = vec![0; lengths[root]];
            }
            let root = world.process_at_rank(root as i32);
            bytes.chunks_mut(MOST).for_each(|piece| root.broadcast_into(piece));
            Ok(bytes)
        })
    }

    fn check(&self, failure: Option<&str>) -> Result<()> {
        self.world(|world| self.begin(world, Call::Check, 0, failure).map(drop))
    }

    fn failed(&self) -> Option<usize> {
        self.failure().as_ref().map(|(rank, _)| *rank)
    }
}
