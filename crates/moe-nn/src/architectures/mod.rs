//! Architectures of the literature, each as small as its idea.
//!
//! What is a router of its own is under [`router`](crate::router): AdaMoE's null experts, top-p, SMoE-Dropout's frozen
//! router, ModuleFormer's gate, expert choice, Sinkhorn balance, hashing.

mod bam;
mod chain_of_experts;
mod composition;
mod crms_norm;
mod deepseek_moe;
mod dmoerm;
mod duo;
mod layer_norm_scaling;
mod memory;
mod mofme;
mod mome;
mod mova;
mod progressive_norm;
mod read_me;
mod rmoe;
mod stick_breaking;
mod tucker;
mod ultra_mem;
mod unified_norm;
mod union_of_experts;
mod wide_net;

pub use bam::{AttentionMixture, AttentionMixtureConfig};
pub use chain_of_experts::{ChainOfExperts, ChainOfExpertsConfig};
pub use composition::{CategoryTable, Composed, CompositionRouter, CompositionRouterConfig};
pub use crms_norm::{CrmsNorm, CrmsNormConfig};
pub use deepseek_moe::DeepSeekMoeConfig;
pub use dmoerm::{CapabilityExperts, CapabilityExpertsConfig, TwoLevelReward, TwoLevelRewardConfig};
pub use duo::{DuoLayer, DuoLayerConfig, DuoOutput};
pub use layer_norm_scaling::{ScaledNorm, ScaledNormConfig};
pub use memory::{MemoryLayer, MemoryLayerConfig, MemoryValues};
pub use mofme::{MofmeLayer, MofmeLayerConfig};
pub use mome::{Mome, MomeConfig};
pub use mova::{CoarseToFine, CoarseToFineConfig, CoarseToFineOutput};
pub use progressive_norm::{ProgressiveNorm, ProgressiveNormConfig};
pub use read_me::{PreGate, PreGateConfig, ReadMe, ReadMeConfig, domain_scores};
pub use rmoe::{RmoeStack, RmoeStackConfig};
pub use stick_breaking::{StickBreakingAttention, StickBreakingAttentionConfig, stick_breaking};
pub use ultra_mem::{MemoryTable, UltraMem, UltraMemConfig, UltraMemInit, UltraMemLayer};
pub use unified_norm::{UnifiedNorm, UnifiedNormConfig};
pub use union_of_experts::{UnionOfExperts, UnionOfExpertsConfig, UnionRouting};
pub use wide_net::{WideNet, WideNetConfig};
