//! The tests of the crate in one program, which is linked once.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/run.rs"]
mod run;
#[path = "../common/synthetic.rs"]
mod synthetic;

mod allocators;
mod apply;
mod budgets;
mod coverage;
mod edits;
mod families;
mod fine_grained;
mod mixed_precision;
mod mtp;
mod options;
mod piece_calibration;
mod plan_files;
mod probe;
mod quantized;
mod recipes;
mod round_trips;
mod rounds;
mod search;
mod selection;
mod sources;
