//! Shared parts of the runnable examples: command-line helpers, tables, figures and the HTML report.
