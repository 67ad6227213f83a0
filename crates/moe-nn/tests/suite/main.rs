//! The tests of the crate in one program, which is linked once.

#[path = "../common/mod.rs"]
mod common;

mod architectures;
mod gradients;
mod layer;
mod losses;
mod routers;
mod transformer;
