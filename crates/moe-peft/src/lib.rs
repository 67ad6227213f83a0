//! Parameter-efficient fine-tuning of Mixture-of-Experts models.
//!
//! What is trained is either a part of the model's own weights or an adapter beside a frozen weight. Both reach every linear map of the
//! model, routed experts included, through [`moe_core::adapters`], and are trained by [`moe_core::train`]. What makes adapters puts them
//! into an [`AdapterSet`]; the values they train are in its [`Bank`].

#![deny(missing_docs)]

mod array_file;
pub mod codec;
pub mod compressed_experts;
pub mod condenser;
pub mod dense_mixer;
mod error;
pub mod esft;
pub mod fold;
mod live;
pub mod lora;
pub mod merge;
pub mod mixture;
pub mod own;
pub mod peft;
pub mod places;
pub mod probe;
pub mod report;
pub mod router_loss;
pub mod sampling;
mod set;
pub mod smt;
mod task;

pub use error::{Error, Result};
pub use live::{Bank, Live};
pub use set::{AdapterSet, SweepListener};
pub use task::{FineTune, Method, Plain, Target};
