//! Shared parts of the runnable examples: command-line helpers, tables, figures and the HTML report.

pub mod cli;
pub mod error;
pub mod trace;

pub use error::{Error, Result};
