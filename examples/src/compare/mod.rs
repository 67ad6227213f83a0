//! Ways to prune compared at equal size, as `compare_methods` does it.

mod arguments;
mod bench;
mod case;
pub mod catalogue;
mod knock_out;
mod lab;
mod rows;
mod scored;
mod study;
mod summary;

pub use arguments::{Arguments, DEFAULT_OUT};
pub use bench::{Bench, Figures, Metrics};
pub use case::{Amount, Case, Journal, Record};
pub use lab::{Job, Lab};
pub use rows::{Draw, HeldOut, Limits};
pub use scored::{Scored, Tables};
pub use study::{CAPABILITIES, Finished, KNOCK_OUT, Runner, Settings, Study};
pub use summary::{Spread, Summary};

use crate::Result;
use crate::progress::Progress;

/// Runs what the arguments ask for.
///
/// # Errors
/// What is wrong with the arguments, or what stopped the work; `--resume` goes on from there.
pub fn run(arguments: Arguments, progress: Progress) -> Result<String> {
    let finished = Study::new(arguments)?.run(progress)?;
    Ok(format!("{:?}\n", finished.summary.ranking()))
}
