#![doc = include_str!("../../README.md")]
//!
//! # This crate
//! What the runnable examples share: the bundled model, and the job of `fisher_prune_qwen`.

pub mod fisher_prune;

pub(crate) use moe::{Error, Result, figures, format, progress, report, table};
pub(crate) use moe_cli::cli;

/// Directory of the bundled checkpoint, a Qwen2-MoE of 3.3 million parameters trained on three capabilities; `data` in it has their rows.
pub const TINY_MOE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-moe");
