//! A group inside one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Group, expect_messages};
use crate::{Error, Result};

/// One of several threads that are a group: for tests, and for several devices of one machine.
///
/// A thread that ends before the others, by a panic say, fails them; nobody waits for it.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    table: Arc<Table>,
}

/// Where threads meet: each puts down what it sends, waits for all, and takes what is for it.
#[derive(Debug)]
struct Table {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What each rank sends to whom, and what the call is.
    rows: Vec<Option<(Call, Vec<Vec<u8>>)>>,
    /// Ranks that have taken what is for them; none while rows are still put down.
    taken: usize,
    /// Meetings that are over.
    meeting: u64,
    /// Ranks that will make no more calls.
    gone: Vec<bool>,
    failure: Option<(usize, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Exchange,
    Check,
}

impl State {
    /// Whether all have put down what they send.
    fn full(&self) -> bool {
        self.rows.iter().all(Option::is_some)
    }

    /// What has stopped the group, a rank that others wait for in vain included.
    fn fault(&mut self) -> Result<()> {
        let missing = self.gone.iter().zip(&self.rows).position(|(gone, row)| *gone && row.is_none());
        if let (Some(rank), None) = (missing, &self.failure) {
            self.failure = Some((rank, "ended before the others".into()));
        }
        match &self.failure {
            Some((rank, message)) => Err(Error::Rank { rank: *rank, message: message.clone() }),
            None => Ok(()),
        }
    }
}

impl Threads {
    /// The ranks of a group of this size, each for a thread of its own.
    pub fn new(size: usize) -> Vec<Self> {
        let state = State { rows: vec![None; size], taken: 0, meeting: 0, gone: vec![false; size], failure: None };
        let table = Arc::new(Table { state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, table: table.clone() }).collect()
    }

    /// Runs `work` on every rank of a group of this size, and gives what each returned.
    ///
    /// # Panics
    /// If `work` does on any rank.
    pub fn run<T: Send>(size: usize, work: impl Fn(&Self) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let ranks = Self::new(size).into_iter().map(|group| scope.spawn(move || work(&group)));
            let ranks: Vec<_> = ranks.collect();
            let results = ranks.into_iter().map(|rank| rank.join());
            results.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.table.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.table.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn meet(&self, call: Call, row: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let mut state = self.state();
        state.fault()?;
        state.rows[self.rank] = Some((call, row));
        self.table.changed.notify_all();
        while !state.full() {
            state.fault()?;
            state = self.wait(state);
        }
        let calls: Vec<Call> = state.rows.iter().flatten().map(|(call, _)| *call).collect();
        if let Some(rank) = calls.iter().position(|call| *call != calls[0]) {
            let message = format!("makes the call {:?} while rank 0 makes {:?}", calls[rank], calls[0]);
            state.failure.get_or_insert((rank, message));
        }
        // Whoever told a failure has put nothing down.
        if let Some((rank, message)) = state.failure.clone() {
            self.table.changed.notify_all();
            return Err(Error::Rank { rank, message });
        }
        let row = self.rank;
        let column = state.rows.iter_mut().flatten().map(|(_, to)| to.get_mut(row).map(std::mem::take));
        let column = column.map(Option::unwrap_or_default).collect();
        state.taken += 1;
        if state.taken == calls.len() {
            (state.taken, state.meeting) = (0, state.meeting + 1);
            state.rows.fill(None);
            self.table.changed.notify_all();
        } else {
            // The next row must not be put down over one that is still to be taken.
            let meeting = state.meeting;
            while state.meeting == meeting && state.failure.is_none() {
                state = self.wait(state);
            }
        }
        Ok(column)
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.state().rows.len()
    }

    fn exchange(&self, to: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        expect_messages(self, &to)?;
        self.meet(Call::Exchange, to)
    }

    fn check(&self, failure: Option<&str>) -> Result<()> {
        if let Some(message) = failure {
            let mut state = self.state();
            state.failure.get_or_insert((self.rank, message.to_string()));
            self.table.changed.notify_all();
            return state.fault();
        }
        self.meet(Call::Check, Vec::new()).map(drop)
    }

    fn failed(&self) -> Option<usize> {
        self.state().failure.as_ref().map(|(rank, _)| *rank)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let rank = self.rank;
        self.state().gone[rank] = true;
        self.table.changed.notify_all();
    }
}
