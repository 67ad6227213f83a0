//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! [`read`] takes every layout of LoRA that PEFT 0.17 to 0.21 wrote: linear modules, experts one by one (transformers
//! 4), fused experts (transformers 5) in the order of 0.19.1 and in the swapped one before it, DoRA's magnitudes.
//! [`write()`] writes what 0.21 reads, fused or one by one. Besides low-rank additions, to embeddings and output head
//! as well, files may have tensors in place of the model's: modules saved whole, trained biases, trained rows of the
//! embeddings. A tensor that belongs to nothing in the model is an error, and so is an option that would change the
//! result and is not implemented.

mod config;
mod fused;
mod read;
mod write;

pub use config::AdapterConfig;
pub use fused::{FusedExperts, FusedLayout};
pub use read::{ReadOptions, read, read_converted};
pub use write::{WriteOptions, check, write};

/// File of options.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File of values.
pub const MODEL_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before paths.
const PREFIX: &str = "base_model.model.";
