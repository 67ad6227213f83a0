//! One pass over the calibration data, and the scores of every method from it.

use std::time::Instant;

use moe_checkpoint::ScoreTable;
use moe_importance::Progress as CollectProgress;

use super::job::Job;
use crate::Result;
use crate::progress::{Progress, Unit};

/// Scores of all methods and how they came about.
#[derive(Debug)]
pub struct Scored {
    /// One table per method.
    pub tables: Vec<ScoreTable>,
    /// The end of the collection.
    pub collected: CollectProgress,
}

/// Runs the model over the waves that the output directory does not hold yet, and scores. Also gives the calibration
/// tokens per second of the waves that this run collected, if there were any.
///
/// # Errors
/// Whatever stops the collection; files of another run in the output directory.
pub fn score(job: &Job, progress: Progress) -> Result<(Scored, Option<f64>)> {
    let bar = progress.bar("scoring", job.calibration.tokens() as u64, Unit::Count("tokens"));
    let mut collected = CollectProgress::default();
    let start = Instant::now();
    let statistics = job.collection().run(&mut |at| {
        bar.at(at.tokens_done);
        collected = *at;
    })?;
    let seconds = start.elapsed().as_secs_f64();
    drop(bar);
    let score = |method: &super::job::Method| method.scorer.score(&statistics, job.model.checkpoint().as_ref());
    let tables = job.methods.iter().map(score).collect::<moe_importance::Result<Vec<_>>>()?;
    tables[0].save(job.out.scores())?;
    let tokens = collected.tokens_done - collected.tokens_resumed;
    let speed = (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds);
    Ok((Scored { tables, collected }, speed))
}
