//! The tests of the crate in one program, which is linked once.

#[path = "../common/mod.rs"]
mod common;

mod apply;
#[cfg(feature = "engine")]
mod engine;
#[cfg(feature = "engine")]
mod expert_maps;
#[cfg(feature = "engine")]
mod planted;
#[cfg(feature = "engine")]
mod sources;
mod sparse;
mod tasks;
#[cfg(feature = "engine")]
mod upcycling;
