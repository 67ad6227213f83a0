//! The tests of the crate in one program, which is linked once.

mod adapters;
mod decoding;
mod distillation;
mod evaluation_groups;
mod expert_cache;
mod layer_drops;
mod layer_paths;
mod layerwise;
mod routing_overlays;
mod run_time_found;
mod run_time_routing;
mod steering;
mod tiny_moe;
mod train_killed;
mod training_groups;
