//! The tests of the crate in one program, which is linked once.

#[path = "../common/mod.rs"]
mod common;

mod calibration;
mod collection;
mod engine;
mod faithful;
mod formulas;
mod groups;
mod open;
mod properties;
mod smoothing;
mod unfinished;
