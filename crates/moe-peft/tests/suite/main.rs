//! The tests of the crate in one program, which is linked once.

#[path = "../chain/mod.rs"]
mod chain;
#[path = "../common/mod.rs"]
mod common;
#[path = "../forms/mod.rs"]
mod forms;
#[path = "../tuning/mod.rs"]
mod tuning;

mod adapter_files;
mod bundled_model;
mod chains;
mod chains_of_methods;
mod codec;
mod compressed_experts;
mod condensers;
mod groups;
mod lora;
mod mixture;
mod model_weights;
mod preflight;
mod recipes;
mod router_training;
mod run_time_methods;
mod ternary_experts;
