//! Shared parts of the runnable examples: command-line helpers, tables, figures and the HTML report.

pub mod cli;
pub mod error;
pub mod figures;
pub mod fisher_prune;
pub mod format;
pub mod progress;
pub mod report;
pub mod score;
pub mod table;
pub mod trace;

pub use error::{Error, Result};
