//! Ways to prune compared at equal size, as `compare_methods` does it.

mod arguments;
mod bench;
mod case;
pub mod catalog;
mod cost;
mod knock_out;
mod lab;
mod layers;
mod merged;
mod merging;
mod merging_tables;
mod output;
mod report;
mod rows;
mod runner;
mod scored;
mod settings;
mod study;
mod subject;
mod summary;
mod tables;
mod user;

pub use arguments::{Arguments, DEFAULT_OUT};
pub use bench::{Bench, Figures, Metrics};
pub use case::{Amount, Case, Journal, Record};
pub use cost::Costs;
pub use lab::{Job, Lab};
pub(crate) use merged::SAMPLE;
pub use merging::{Form, Merging};
pub use rows::{Draw, HeldOut, Limits};
pub use runner::Runner;
pub use scored::{Scored, Tables, score};
pub use settings::{CAPABILITIES, KNOCK_OUT, Settings};
pub use study::{Finished, Study};
pub use summary::{Spread, Summary};
pub use tables::Section;
pub(crate) use tables::{cell, markdown};
pub use user::{Compared, Comparison};

use crate::Result;
use crate::progress::Progress;

/// Runs what the arguments ask for, and gives what is printed.
///
/// # Errors
/// What is wrong with the arguments, or what stopped the work; `--resume` goes on from there.
pub fn run(arguments: Arguments, progress: Progress) -> Result<String> {
    let json = arguments.json;
    if arguments.model.is_some() {
        let compared = Comparison::new(arguments)?.run(progress)?;
        return Ok(if json { format!("{}\n", compared.to_json()?) } else { compared.to_text() });
    }
    let study = Study::new(arguments)?.run(progress)?;
    let text = print(&study)?;
    if json { Ok(format!("{}\n", output::json(&study)?)) } else { Ok(text) }
}

/// Writes the files of a finished study, and gives its tables as text.
///
/// # Errors
/// Files that cannot be written.
pub fn print(study: &Finished) -> Result<String> {
    let mut text = String::new();
    for Section { title, note, table, .. } in output::write(study)? {
        text.push_str(&format!("{title}\n{note}\n{}\n\n", table.to_text()));
    }
    text.push_str(&format!("figures in {}\n", study.out.report().display()));
    Ok(text)
}
