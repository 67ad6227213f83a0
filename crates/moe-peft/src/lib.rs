//! Parameter-efficient fine-tuning of Mixture-of-Experts models.
//!
//! What is trained is either a part of the model's own weights or an adapter beside a frozen weight. Both reach every linear map of the
//! model, routed experts included, through [`moe_core::adapters`], and are trained by [`moe_core::train`]. What makes adapters puts them
//! into an [`AdapterSet`]; the values they train are in its [`Bank`].

#![deny(missing_docs)]

mod error;
mod live;
pub mod lora;
pub mod merge;
pub mod mixture;
pub mod peft;
mod set;

pub use error::{Error, Result};
pub use live::{Bank, Live};
pub use set::{AdapterSet, SweepListener};
