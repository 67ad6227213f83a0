//! Low-rank adapters: LoRA, rsLoRA and DoRA on every linear map, routed experts included.
//!
//! [`LoraConfig`] says what is adapted and how, [`LoraConfig::init`] makes [`LoraWeights`] of it, and [`Lora::install`]
//! puts one or several of them into an [`AdapterSet`](crate::AdapterSet). [`peft`](crate::peft_files) reads and writes
//! them as PEFT's files.

mod config;
mod dora;
mod dropout;
mod embedding;
mod init;
mod install;
mod linear;
mod maps;
mod modern;
mod targets;
mod weights;

pub mod corda;

pub use config::{CordaMethod, Init, LoraConfig, Patterns, Targets};
pub use dropout::SweepClock;
pub use install::Lora;
pub use linear::LoraLinear;
pub use maps::{Maps, Naming};
pub use targets::Share;
pub use weights::{LoraWeights, LowRank};

pub(crate) use dropout::Dropout;
pub(crate) use init::{kaiming, magnitudes, normal, random, split, svd};
pub(crate) use linear::Start;
pub(crate) use targets::{Compiled, ends_with};
