//! Measuring many configurations.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::case::Journal;
use super::lab::{Job, Lab};
use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// One worker per core.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Measures, some configurations at a time, and writes each down as it is done.
pub struct Runner<'a> {
    /// What has been measured.
    pub journal: Journal,
    /// Configurations at a time.
    pub workers: usize,
    /// Builds them.
    pub lab: &'a Lab,
    /// Where progress is shown.
    pub progress: Progress,
}

impl Runner<'_> {
    /// Runs the jobs that the journal does not have.
    ///
    /// # Errors
    /// The first that stops one; what is finished is in the journal.
    pub fn run(&mut self, label: &str, jobs: Vec<Job>) -> Result<()> {
        let missing = |job: &Job| !self.journal.has(&job.case, &self.lab.bench.names(job.figures));
        let jobs: Vec<Job> = jobs.into_iter().filter(missing).collect();
        if jobs.is_empty() {
            return Ok(());
        }
        let bar = self.progress.bar(label, jobs.len() as u64, Unit::Count("configurations"));
        let next = AtomicUsize::new(0);
        let journal = Mutex::new((&mut self.journal, None::<Error>));
        let (lab, workers) = (self.lab, self.workers.clamp(1, jobs.len()));
        let work = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let record = lab.run(job);
                let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
                if journal.1.is_some() {
                    return;
                }
                match record.and_then(|record| journal.0.add(record)) {
                    Ok(()) => bar.step(),
                    Err(error) => {
                        journal.1 = Some(error);
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            (1..workers).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        match journal.into_inner().unwrap_or_else(PoisonError::into_inner).1 {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
