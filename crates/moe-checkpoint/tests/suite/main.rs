//! The tests of the crate in one program, which is linked once.

#[path = "../common/mod.rs"]
mod common;

mod dialects;
mod flat_ragged;
mod held;
mod model_types;
mod quantized;
mod quantizing;
mod reading;
mod refusals;
mod released;
mod score_files;
mod sources;
mod statistics_files;
mod writing;
