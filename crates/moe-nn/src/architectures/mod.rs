//! Architectures of the literature, each as small as its idea.
//!
//! What is a router of its own is under [`router`](crate::router): AdaMoE's null experts, top-p, SMoE-Dropout's frozen
//! router, ModuleFormer's gate, expert choice, Sinkhorn balance, hashing.

mod chain_of_experts;
mod deepseek_moe;
mod duo;
mod layer_norm_scaling;
mod memory;
mod mofme;
mod mome;
mod rmoe;
mod union_of_experts;
mod wide_net;

pub use chain_of_experts::{ChainOfExperts, ChainOfExpertsConfig};
pub use deepseek_moe::DeepSeekMoeConfig;
pub use duo::{DuoLayer, DuoLayerConfig, DuoOutput};
pub use layer_norm_scaling::{ScaledNorm, ScaledNormConfig};
pub use memory::{MemoryLayer, MemoryLayerConfig, MemoryValues};
pub use mofme::{MofmeLayer, MofmeLayerConfig};
pub use mome::{Mome, MomeConfig};
pub use rmoe::{RmoeStack, RmoeStackConfig};
pub use union_of_experts::{UnionOfExperts, UnionOfExpertsConfig, UnionRouting};
pub use wide_net::{WideNet, WideNetConfig};
