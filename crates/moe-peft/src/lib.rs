//! Parameter-efficient fine-tuning of Mixture-of-Experts models.
//!
//! What is trained is either a part of the model's own weights or an adapter beside a frozen weight. Both reach every linear map of the
//! model, routed experts included, through [`moe_core::adapters`], and are trained by [`moe_core::train`]. What makes adapters puts them
//! into an [`AdapterSet`]; the values they train are in its [`Bank`].

#![deny(missing_docs)]

mod adapter_set;
mod array_file;
pub mod codec;
pub mod compressed_experts;
pub mod condenser;
pub mod dense_mixer;
mod error;
pub mod esft;
mod fine_tune;
pub mod fold;
pub mod input_watch;
pub mod layer_sampling;
pub mod lora;
pub mod merge;
pub mod method_config;
pub mod mixture;
pub mod model_weights;
mod named_methods;
mod parameter_bank;
pub mod peft_files;
mod recipe;
mod rewrite;
pub mod router_loss;
mod saved_tuning;
pub mod smt;
pub mod trainable;
pub mod trainable_tensors;
mod training_run;
mod tuning_method;

pub use adapter_set::{AdapterSet, SweepListener};
pub use error::{Error, Result};
pub use fine_tune::{FineTune, Plain, Target, TrainingHooks};
pub use method_config::MethodConfig;
pub use named_methods::{METHODS, NamedMethod};
pub use parameter_bank::{Bank, Live};
pub use recipe::Recipe;
pub use saved_tuning::{SavedKind, SavedTuning, open};
pub use training_run::{LossPoint, OnRunEvent, RunEvent, SavedPaths, Trained, TrainingCost, TrainingRun};
pub use tuning_method::{Artifacts, Installed, Phase, PhaseEnd, Setting, TuningMethod};
