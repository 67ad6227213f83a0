#![doc = include_str!("../../README.md")]
//!
//! # This crate
//! Shared parts of the runnable examples: command-line helpers, tables, figures and the HTML report.

pub mod cli;
pub mod compare;
pub mod delta;
pub mod error;
pub mod exports;
pub mod figures;
pub mod fine_grained;
pub mod finetune;
pub mod fisher_prune;
pub mod format;
pub mod merge;
pub mod progress;
pub mod report;
pub mod router_study;
pub mod score;
pub mod table;
pub mod trace;

pub use error::{Error, Result};

/// Directory of the bundled checkpoint, a Qwen2-MoE of 3.3 million parameters trained on three capabilities; `data` in it has their rows.
pub const TINY_MOE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-moe");
