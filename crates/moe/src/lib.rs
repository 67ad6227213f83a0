//! Mixture-of-Experts compression and fine-tuning, all crates behind one door.
//!
//! The crates that do the work are re-exported under short names, with what a program needs most in [`prelude`]. The
//! usual jobs are a function each:
//!
//! ```no_run
//! use moe::prelude::*;
//!
//! let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
//! let scores = score(&model, &rows(&model, "my_domain.jsonl", 128)?, &Fisher::default())?;
//! let half = prune(&model, &scores, &UnitPruner::new(Scope::Expert), Budget::Ratio(0.5), PruneForm::Uniform)?;
//! write(half.checkpoint(), "out/half", &WriteOptions::default())?;
//! # Ok::<(), moe::Error>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`jobs`] | score, prune, merge, tune, measure: a function each, over models in memory |
//! | [`recipe`], [`run`] | a whole chain as one JSON file, checked first, resumed, its artifacts reused |
//! | [`eval_file`] | rows to measure a model on |
//! | [`report`], [`figures`], [`table`], [`mod@format`] | what is shown to people: one HTML file, SVG, text and Markdown |
//! | [`out_dir`], [`progress`] | directories of runs; progress on stderr |
//! | [`checkpoint`], [`core`], [`importance`], [`prune`], [`merge`], [`peft`] | the crates behind it |
//!
//! # Features
#![doc = document_features::document_features!()]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod error;
pub mod eval_file;
pub mod expert_ranking;
pub mod figures;
pub mod format;
pub mod jobs;
pub mod out_dir;
pub mod prelude;
pub mod progress;
pub mod recipe;
pub mod report;
pub mod run;
pub mod table;

pub use error::{Error, Result};
#[cfg(feature = "nn")]
pub use moe_core::nn;
pub use {
    moe_checkpoint as checkpoint, moe_core as core, moe_importance as importance, moe_merge as merge, moe_peft as peft,
    moe_prune as prune,
};
