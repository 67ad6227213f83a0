//! The program `moe`: every verb maps files to one job.
//!
//! # Features
#![doc = document_features::document_features!()]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod adapt;
pub mod adapter;
pub mod adapters;
pub mod apply;
pub mod cli;
pub mod compare;
pub mod convert;
pub mod delta;
pub mod eval;
pub mod finetune;
pub mod fisher_prune;
pub mod generate;
pub mod hub;
pub mod inspect;
pub mod merge;
mod own_rows;
pub mod pages;
pub mod program;
pub mod prune;
pub mod quantize;
pub mod run;
pub mod score;
pub mod serve;
pub mod trace;
pub mod upcycle;

pub(crate) use moe::{Error, Result, figures, format, progress, report, table};

/// Directory of the bundled checkpoint, a Qwen2-MoE of 3.3 million parameters trained on three capabilities; `data` in
/// it has their rows.
pub const TINY_MOE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/assets/tiny-moe");
