//! Mixtures of LoRA experts: one adapter whose router, selection, combine weight and balance loss are parts of their
//! own.
//!
//! | recipe | router | selection | weight | balance |
//! |---|---|---|---|---|
//! | [MoLA](MixtureConfig::mola) | every map | top k | renormalized `p` | `N sum f P` |
//! | [MixLoRA](MixtureConfig::mix_lora) | every block | top k | renormalized `p` | `N sum f P` |
//! | [LLaVA-MoLE](MixtureConfig::llava_mole) | every block | top 1 | 1 | `N sum f P` |
//! | [DynMoLE](MixtureConfig::dyn_mole) | every map | all, or the top of `p` | `p` | entropy and load |
//! | [LoRAMoE](MixtureConfig::lora_moe) | every map | all | `p` | dispersion by type of sample |
//! | [LoRA-Mixer](MixtureConfig::lora_mixer_router) | attention | all, then top 3 | `p` | load minus entropy |
//! | [SMoRA](MixtureConfig::smora) | every map, over ranks | top k | biased sigmoid | bias |
//! | [MoRAM](MixtureConfig::moram) | none | top k of `A x` | softmax | none |
//! | [FlyLoRA](MixtureConfig::fly_lora) | none | top k of `A x` | 1 | bias |
//!
//! What a token uses depends on the token, so that none of them is a matrix: [`Mixture::merge`] says so, except where
//! there is but one expert, and [`Mixture::approximate_merge`] is a choice.

mod balance;
mod block;
mod config;
mod gate;
mod install;
mod linear;
mod router;
mod state;
mod store;

pub use balance::{Balance, Dispersion, Scope};
pub use config::{Allocation, Experts, MixtureConfig};
pub use gate::{Gate, Score};
pub use install::{MeanWeights, Mixture};
pub use state::KeepsSelection;
pub use store::{CONFIG_FILE, MODEL_FILE};
