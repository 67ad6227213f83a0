#![doc = include_str!("../../README.md")]
//!
//! # This crate
//! The runnable examples (`cargo run --release --example NAME`), and the bundled model that they run on.

/// Directory of the bundled checkpoint, a Qwen2-MoE of 3.3 million parameters trained on three capabilities; `data` in
/// it has their rows.
pub const TINY_MOE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-moe");
